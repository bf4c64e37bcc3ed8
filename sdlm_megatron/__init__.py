"""Train Sequential Diffusion Language Models (arXiv 2509.24007) on Megatron-Core."""

__version__ = "0.2.0"
