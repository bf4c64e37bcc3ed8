"""The training loop and what surrounds it: run plan, resume, hooks, samples, validation, profiling."""
