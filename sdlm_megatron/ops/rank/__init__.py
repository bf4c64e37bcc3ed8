"""A run that notices what goes wrong: stop requests, hangs, stragglers, spikes, NaN, replicas that differ."""
