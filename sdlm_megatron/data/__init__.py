"""Packed dataset: file format, row order, and the micro-batches of a training step."""
