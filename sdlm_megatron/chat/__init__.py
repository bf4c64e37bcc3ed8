"""What `python -m sdlm_megatron.chat.generate` is made of: a model folder that answers, and the terminal it answers in."""
