"""What a run tells: console line, JSONL, TensorBoard, W&B, model FLOPs, and the HTML report."""
