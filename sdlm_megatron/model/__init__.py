"""SDLM as a Megatron-Core model: layers, attention by block mask, LM head on label rows."""
