"""What SDLM is: blocks, targets, visibility, loss, decoding. No Megatron here."""
