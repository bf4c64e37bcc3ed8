"""Running the model on many processes: groups, CPU redirect, one training step."""
