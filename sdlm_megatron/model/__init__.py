"""SDLM's transformer in Megatron-Core: layers, attention by the block mask, head on label rows, Hugging Face names."""
