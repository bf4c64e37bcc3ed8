"""Samples during training: a few prompts of the dataset, decoded with the weights of the moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from sdlm_megatron.chat.passes import token_texts
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.tokenizer_identity import has_tokenizer
from sdlm_megatron.diffusion.decode import decode
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.metrics.sinks import sample_table
from sdlm_megatron.parallel.engine import Engine, EngineProposer
from sdlm_megatron.weights.checkpoint_folder import TrainState

PROMPTS, NEW_TOKENS, THRESHOLD = 4, 32, 0.9
SEARCHED_ROWS = 64


@dataclass(frozen=True)
class Prompt:
    """A document up to the anchor of its first block."""

    ids: list[int]
    answer: list[int]
    """What follows in the document: to the end of the turn, NEW_TOKENS at most."""


def choose_prompts(dataset: PackedDataset) -> list[Prompt]:
    """The first documents that, decoded, fit a row together. ConfigError where not even one does."""
    eos, left = dataset.manifest["eos_token_id"], dataset.row_length
    found: list[Prompt] = []
    for number in range(min(dataset.rows(0), SEARCHED_ROWS)):
        tokens, layout = dataset.read(0, number)
        cleans = np.split(tokens[: layout.n_clean], np.cumsum(layout.clean_lens)[:-1])
        starts = np.split(layout.starts, np.cumsum(layout.n_blocks)[:-1])
        for clean, of_document in zip(cleans, starts, strict=True):
            if not len(of_document) or len(found) == PROMPTS:
                continue
            cut = int(of_document[0]) + 1
            needed = cut + NEW_TOKENS + dataset.block_size
            if needed <= left:
                left -= needed
                answer = clean[cut : cut + NEW_TOKENS].tolist()
                end = answer.index(eos) + 1 if eos in answer else len(answer)
                found.append(Prompt(clean[:cut].tolist(), answer[:end]))
    if not found:
        raise ConfigError(
            f"no document of the first {SEARCHED_ROWS} rows leaves room for {NEW_TOKENS} new tokens in a row of "
            f"{dataset.row_length}",
            "observe.sample_every",
            "--observe.sample_every=0",
        )
    return found


class Sampler:
    """Decodes the same prompts whenever it is called; all processes call it together.

    Args:
        engine: the engine in training.
        state: of the run.
        dataset: where the prompts come from, and the length of a row.
        assets: folder with the tokenizer's files; without them samples are written as token ids.
    """

    def __init__(self, engine: Engine, state: TrainState, dataset: PackedDataset, assets: Path | None) -> None:
        self.engine, self.state = engine, state
        self.prompts = choose_prompts(dataset)
        self._propose = EngineProposer(engine, mask_token_id=state.mask_token_id, row_length=dataset.row_length)
        self._tokenizer = _tokenizer(assets) if engine.groups.main else _Ids()

    def __call__(self) -> dict[str, Any]:
        """A record for samples.jsonl: `tokens_per_pass` of all, and `samples` in the form of report/evaluation_record.py."""
        rows = [torch.tensor(p.ids) for p in self.prompts]
        ids = pad_sequence(rows, batch_first=True)
        real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with self.engine.inference():
            done = decode(
                self._propose,
                ids.to(self.engine.groups.device),
                mask_token_id=self.state.mask_token_id,
                window=self.state.diffusion.block_size,
                threshold=THRESHOLD,
                max_new_tokens=NEW_TOKENS,
                eos_token_ids=[self.state.eos_token_id],
                attention_mask=real,
            )
        answers = zip(self.prompts, done.tokens, done.accepted, strict=True)
        return {"tokens_per_pass": done.tokens_per_pass, "samples": [self._sample(*answer) for answer in answers]}

    def _sample(self, prompt: Prompt, tokens: list[int], accepted: list[int]) -> dict[str, Any]:
        return {
            "prompt": self._tokenizer.decode(prompt.ids),
            "answer_tokens": token_texts(self._tokenizer, tokens, accepted),
            "expected": self._tokenizer.decode(prompt.answer, skip_special_tokens=True),
            "prompt_ids": prompt.ids,
            "tokens": tokens,
            "accepted": accepted,
        }


def lines_of(record: dict[str, Any], width: int = 100) -> str:
    """A record for the console: an answer a line, bars between what came in different passes."""
    lines = [f"samples, {record['tokens_per_pass']:.2f} tokens a pass:"]
    for sample in sample_table(record):
        answer = sample["answer"].replace("\n", "⏎")
        lines.append(f"  {answer if len(answer) <= width else answer[: width - 1] + '…'}")
    return "\n".join(lines)


class _Ids:
    """Stands for a tokenizer where there is none: token ids as text."""

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return "".join(f"{t} " for t in tokens)


def _tokenizer(assets: Path | None) -> Any:
    if assets is None or not has_tokenizer(assets):
        return _Ids()
    from transformers import AutoTokenizer  # slow to import, and only runs with samples want it

    try:
        return AutoTokenizer.from_pretrained(assets, trust_remote_code=False)
    except (OSError, ValueError) as error:
        print(f"samples are shown as token ids: the tokenizer of {assets} cannot be opened: {error}", flush=True)
        return _Ids()
