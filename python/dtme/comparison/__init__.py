"""Whether a plan is worth its cost on the tasks at hand, over paired seeds."""
