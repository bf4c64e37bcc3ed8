"""A tokenizer class that uses tokenizer.json unchanged.

For `model_type: qwen2` transformers 5 silently replaces the splitting rules of tokenizer.json by Qwen2's, for any class
named in tokenizer_config.json. A model with another tokenizer then reads other tokens than it was trained on. An
auto_map entry in tokenizer_config.json switches that off; it names this class.
"""

from transformers import PreTrainedTokenizerFast


class SDLMTokenizerFast(PreTrainedTokenizerFast):
    """A fast tokenizer without code of its own."""
