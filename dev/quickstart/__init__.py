"""The demonstration on a real model, `make quickstart`."""
