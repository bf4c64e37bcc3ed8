"""Programs of the pre-flight that run on each node of a job, before training starts there."""
