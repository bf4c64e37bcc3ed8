"""Planner: memory, time and cost of a layout without building anything. The command is `sdlm plan`."""
