"""The evidence of docs/evidence.md: the paper's claims re-made on a real model of laptop size."""
