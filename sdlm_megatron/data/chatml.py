"""The form of a turn, as data is prepared, exported and chatted with: `<|im_start|>ROLE\\nTEXT<|im_end|>\\n`."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
"""System turn in front of a conversation without one, unless the dataset's settings say otherwise."""
