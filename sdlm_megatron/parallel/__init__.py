"""Training on many processes: groups, optimizer, one training step, and Megatron-Core on a CPU."""
