"""Model weights as files: names, Hugging Face folders, training checkpoints. No Megatron."""
