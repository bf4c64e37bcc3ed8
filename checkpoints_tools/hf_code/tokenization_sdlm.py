"""tokenizer.json as it is.

For `model_type: qwen2` transformers 5 puts Qwen2's own splitting rules in place of those in tokenizer.json,
without a word, whatever class tokenizer_config.json names. A model with another tokenizer then reads other
tokens than it was trained on. An auto_map entry in tokenizer_config.json switches that off; this class is
what it names.
"""

from transformers import PreTrainedTokenizerFast


class SDLMTokenizerFast(PreTrainedTokenizerFast):
    """A tokenizer that is nothing but its tokenizer.json."""
