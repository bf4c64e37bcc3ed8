"""What a layout needs in memory and time, without building anything: `python -m sdlm_megatron.planner.plan`."""
