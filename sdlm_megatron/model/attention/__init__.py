"""Attention over a packed row: one contract, several backends."""
