"""Measurements of an exported folder: quality, speed, calibration, perplexity; adapters for evaluation harnesses."""
