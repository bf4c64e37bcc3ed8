"""Prompts that training decodes as samples."""

from dataclasses import dataclass

import numpy as np

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import ConfigError

PROMPTS, NEW_TOKENS = 4, 32
"""Number of prompts, and of new tokens per prompt at most."""
SEARCHED_ROWS = 64
"""Rows of the dataset in which prompts are searched."""


@dataclass(frozen=True)
class SamplePrompt:
    """A document up to the anchor of its first block."""

    ids: list[int]
    answer: list[int]
    """The document's tokens that follow: to the end of the turn, at most NEW_TOKENS."""


def choose_prompts(dataset: PackedDataset) -> list[SamplePrompt]:
    """The first documents of the dataset that fit into one row together once they are decoded.

    Raises:
        ConfigError: not a single document fits.
    """
    eos, room = dataset.manifest["eos_token_id"], dataset.row_length
    prompts: list[SamplePrompt] = []
    for number in range(min(dataset.rows(0), SEARCHED_ROWS)):
        tokens, layout = dataset.read(0, number)
        cleans = np.split(tokens[: layout.n_clean], np.cumsum(layout.clean_lens)[:-1])
        anchors = np.split(layout.anchors, np.cumsum(layout.n_blocks)[:-1])
        for clean, own_anchors in zip(cleans, anchors, strict=True):
            if not len(own_anchors) or len(prompts) == PROMPTS:
                continue
            cut = int(own_anchors[0]) + 1  # the anchor is the last token of the prompt
            # all prompts are decoded in one row: tokens so far, and a window of block_size
            needed = cut + NEW_TOKENS + dataset.block_size
            if needed <= room:
                room -= needed
                answer = clean[cut : cut + NEW_TOKENS].tolist()
                end = answer.index(eos) + 1 if eos in answer else len(answer)
                prompts.append(SamplePrompt(clean[:cut].tolist(), answer[:end]))
    if not prompts:
        raise ConfigError(
            f"no document in the first {SEARCHED_ROWS} rows leaves room for {NEW_TOKENS} new tokens in a row of "
            f"{dataset.row_length}",
            "observe.sample_every",
            "--observe.sample_every=0",
        )
    return prompts
