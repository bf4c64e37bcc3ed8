"""Attention of a packed row: one contract, several backends."""
