"""What `python -m sdlm_megatron.generate` is made of: a model folder that answers, and the terminal it answers in."""
