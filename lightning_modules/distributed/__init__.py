"""Distributes one model over ranks: FSDP2, tensor parallelism and gathering."""
