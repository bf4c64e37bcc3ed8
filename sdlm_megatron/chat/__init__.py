"""A model folder that answers conversations, and the terminal chat of `sdlm generate`."""
