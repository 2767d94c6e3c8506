"""What the conflict signal is worth: measured image by image along a training, and what can be read off it."""
