"""Measures an exported folder: quality against speed, confidence against correctness, cost; models for harnesses."""
