"""Runs on a Slurm cluster: submission, pre-flight, the driver of a job, requeues. Nothing here needs Megatron."""
