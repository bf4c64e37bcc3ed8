"""Metrics of a run: the table of metrics, the console line, and the sinks JSONL, TensorBoard and W&B."""
