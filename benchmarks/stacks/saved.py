"""Files: saved, loaded, sharded, damaged."""
