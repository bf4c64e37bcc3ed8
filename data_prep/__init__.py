"""Conversations in, a packed dataset out: sources -> chat -> tokens -> blocks -> packing -> files."""
