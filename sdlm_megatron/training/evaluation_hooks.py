"""Hooks that evaluate the current weights during training: on held-out rows, and on a few prompts of the dataset."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sdlm_megatron.chat.passes import token_texts
from sdlm_megatron.data.batch import StepLoader
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.tokenizer_identity import has_tokenizer
from sdlm_megatron.diffusion.decode import Decoded, decode
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.evaluation import signatures
from sdlm_megatron.metrics.formats import format_duration
from sdlm_megatron.metrics.metric_table import VALIDATION
from sdlm_megatron.metrics.sinks import sample_table
from sdlm_megatron.parallel.engine import EngineProposer
from sdlm_megatron.training.hooks import Hook, TrainingRun
from sdlm_megatron.training.sample_prompts import NEW_TOKENS, SamplePrompt, choose_prompts

THRESHOLD = 0.9
"""Confidence threshold with which samples are decoded."""


class ValidationHook(Hook):
    """Measures the same held-out rows every observe.validate_every steps and at the last step.

    Args:
        dataset: from `open_validation`. All processes measure together, each its share of the rows.
    """

    def __init__(self, run: TrainingRun, dataset: PackedDataset) -> None:
        super().__init__(run)
        self.dataset = dataset
        wanted, available = run.config.observe.validation_rows, dataset.rows(0)
        self.rows = min(wanted, available) if wanted else available

    def due(self, step: int) -> bool:
        return self.run.every(self.run.config.observe.validate_every, step)

    def after_due_step(self, step: int) -> None:
        run, started = self.run, time.perf_counter()
        run.watch.at("validate")
        with run.pause("validate"):
            record: dict[str, Any] = {}
            with run.optional("validation", together=True):
                record = self.measure()
            if run.sinks is not None and record:
                seconds = time.perf_counter() - started
                with run.optional("the output of a validation"):
                    run.sinks.log_validation(step, record)
                    print(summary_line(record, seconds), flush=True)
                run.watch.event("validated", step=step, seconds=seconds)

    def measure(self) -> dict[str, Any]:
        """A record for validation.jsonl: the fields of a log record's losses and device metrics, prefixed by val_."""
        with self.run.engine.inference():
            result = self.run.engine.evaluate(self._steps())
        fields: dict[str, Any] = {f"{VALIDATION}{name}": value for name, value in result.fields().items()}
        named = {"val_rows": self.rows, "held_out_data": self.dataset.manifest["checksum"][:12]}
        return {**fields, "val_targets": result.targets, **named}

    def _steps(self) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches, with the documents of as many rows at a time as a training step has.

        They are the first rows of the training order with a fixed seed: a random sample of all held-out rows, and the
        same in every validation and every run.
        """
        run = self.run
        together = run.state.rows_per_step
        # the same weight as in training: val_loss and loss are comparable
        weight = run.config.diffusion.next_token_weight
        loader = StepLoader(self.dataset, run.grid, together, self.rows, seed=0, next_token_weight=weight)
        for begin in range(0, self.rows, together):
            yield loader.load(begin, run.engine.groups.dp_rank)


def summary_line(record: dict[str, Any], seconds: float) -> str:
    """A validation record as one line for the console."""

    def slots(name: str) -> str:
        return " ".join(f"{x:.3f}" for key, x in record.items() if key.startswith(f"val_{name}_pos_"))

    accepted = [f"{x:.2f} at {key.rpartition('_')[2]}" for key, x in record.items() if key.startswith("val_accepted_")]
    return (
        f"validation on {record['val_rows']} rows, {format_duration(seconds)}: loss {record['val_loss']:.4f}, by slot "
        f"{slots('loss')}; accuracy by slot {slots('accuracy')}; tokens per pass by threshold: {', '.join(accepted)}"
    )


class SampleHook(Hook):
    """Decodes the same prompts every observe.sample_every steps and at the last step; all processes do so together.

    Without a tokenizer among the plan's assets, samples are written as token ids.
    """

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self.prompts = choose_prompts(run.dataset)
        # the length of training's rows, for which TransformerEngine's user buffers are allocated
        length = run.grid.row_length
        self._propose = EngineProposer(run.engine, mask_token_id=run.state.mask_token_id, row_length=length)
        self._tokenizer = _tokenizer(run.plan.assets) if run.main else _TokenIds()

    def due(self, step: int) -> bool:
        return self.run.every(self.run.config.observe.sample_every, step)

    def after_due_step(self, step: int) -> None:
        run, started = self.run, time.perf_counter()
        run.watch.at("sample")
        with run.pause("samples"):
            done = None
            with run.optional("decoding samples", together=True):
                done = self.decode()
            if run.sinks is not None and done is not None:
                with run.optional("the output of samples"):
                    record = self.record(done)
                    run.sinks.log_samples(step, record)
                    print(sample_lines(record), flush=True)
                run.watch.event("sampled", step=step, seconds=time.perf_counter() - started)

    def decode(self) -> Decoded:
        """The answers of the current weights; all processes call it."""
        rows, state, engine = [torch.tensor(p.ids) for p in self.prompts], self.run.state, self.run.engine
        ids = pad_sequence(rows, batch_first=True)
        real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with engine.inference():
            return decode(
                self._propose,
                ids.to(engine.groups.device),
                mask_token_id=state.mask_token_id,
                window=state.diffusion.block_size,
                threshold=THRESHOLD,
                max_new_tokens=NEW_TOKENS,
                eos_token_ids=[state.eos_token_id],
                attention_mask=real,
            )

    def record(self, done: Decoded) -> dict[str, Any]:
        """A record for samples.jsonl: `tokens_per_pass`, failure signatures (evaluation/signatures.py), `warnings`
        about those beyond their limits, and `samples` as in report/evaluation_record.py.
        """
        expected, ends = [prompt.answer for prompt in self.prompts], [self.run.state.eos_token_id]
        answer_signatures = signatures.of_answers(done.tokens, done.accepted, expected, ends)
        answers = zip(self.prompts, done.tokens, done.accepted, strict=True)
        samples = [self._sample(*answer) for answer in answers]
        numbers = {"tokens_per_pass": done.tokens_per_pass, **signatures.fields(answer_signatures)}
        return {**numbers, "warnings": answer_signatures.warnings(), "samples": samples}

    def _sample(self, prompt: SamplePrompt, tokens: list[int], accepted: list[int]) -> dict[str, Any]:
        return {
            "prompt": self._tokenizer.decode(prompt.ids),
            "answer_tokens": token_texts(self._tokenizer, tokens, accepted),
            "expected": self._tokenizer.decode(prompt.answer, skip_special_tokens=True),
            "prompt_ids": prompt.ids,
            "tokens": tokens,
            "accepted": accepted,
        }


def sample_lines(record: dict[str, Any], width: int = 100) -> str:
    """A record for the console: one line per answer, with a bar between tokens of different passes."""
    lines = [f"samples, {record['tokens_per_pass']:.2f} tokens per pass (a bar separates passes):"]
    for sample in sample_table(record):
        answer = sample["answer"].replace("\n", "⏎")
        lines.append(f"  {answer if len(answer) <= width else answer[: width - 1] + '…'}")
    lines += [f"warning: {text}" for text in record.get("warnings", ())]
    return "\n".join(lines)


class _TokenIds:
    """Replaces a missing tokenizer: shows token ids as text."""

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return "".join(f"{t} " for t in tokens)


def _tokenizer(assets: Path | None) -> Any:
    if assets is None or not has_tokenizer(assets):
        return _TokenIds()
    from transformers import AutoTokenizer  # slow to import, and only runs with samples need it

    try:
        return AutoTokenizer.from_pretrained(assets, trust_remote_code=False)  # no code of a base is run in training
    except Exception as error:  # noqa: BLE001 - the file may hold anything, and samples must not end training
        print(f"samples are shown as token ids: the tokenizer in {assets} cannot be loaded: {error}", flush=True)
        return _TokenIds()
