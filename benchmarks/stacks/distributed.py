"""Several processes: DDP, FSDP2, tensor parallel, and analyses of shards."""
