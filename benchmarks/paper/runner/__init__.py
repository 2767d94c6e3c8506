"""The runner: many runs, each of one arm and seed, two at a time, each of which goes on after a kill."""
