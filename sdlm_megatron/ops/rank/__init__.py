"""Health checks inside a training process: stop requests, hangs, slow hosts, spikes, NaN, differing replicas."""
