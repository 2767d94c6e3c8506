"""Methods that combine the gradients of tasks: torchjd's aggregators, GradNorm, loops like LibMTL's."""
