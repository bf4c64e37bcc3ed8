"""Definition of SDLM: blocks, targets, visibility, loss and decoding. Nothing here imports Megatron."""
