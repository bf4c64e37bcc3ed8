"""ChatML turn format shared by data preparation, export and chat: `<|im_start|>ROLE\\nTEXT<|im_end|>\\n`."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
"""System turn prepended to a conversation without one, unless the dataset's settings override it."""
