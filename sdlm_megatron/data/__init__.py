"""The packed dataset: its files, the order of its rows, and the batches of a step."""
