"""Text from causal models and encoder-decoders, with and without a key-value cache."""
