"""Demonstrations, evidence and benchmarks. Runs from a checkout; not part of the wheel."""
