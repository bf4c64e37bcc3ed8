"""Validation during training: what the model makes of rows that it is not trained on."""

from collections.abc import Iterator
from typing import Any

from sdlm_megatron.data.batch import load_micro_batch
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.order import step_rows
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.metrics.console import format_duration
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.training.run_plan import micro_batch_multiple
from sdlm_megatron.weights.checkpoint_folder import TrainState


class Validator:
    """Looks at the same rows whenever it is called; all processes call it together, each for its share of the rows.

    Args:
        engine: the engine in training.
        state: of the run: as many rows as a step has are looked at together.
        dataset: from `start.open_validation`.
    """

    def __init__(self, engine: Engine, state: TrainState, dataset: PackedDataset) -> None:
        self.engine, self.dataset, self._together = engine, dataset, state.rows_per_step
        asked, there = engine.config.observe.validation_rows, dataset.rows(0)
        self.rows = min(asked, there) if asked else there

    def __call__(self) -> dict[str, Any]:
        """Losses, accuracy, confidence and accepted length as in a log record, with val_ before their names."""
        with self.engine.inference():
            result = self.engine.evaluate(self._steps())
        found: dict[str, Any] = {f"val_{name}": x for name, x in result.learned().items()}
        return {**found, "val_targets": result.targets, "val_rows": self.rows}

    def _steps(self) -> Iterator[list[MicroBatch]]:
        """The first rows of the training's order: a sample of all, with a seed of their own that never changes."""
        groups, config = self.engine.groups, self.engine.config
        for begin in range(0, self.rows, self._together):
            numbers = step_rows(
                begin,
                self._together,
                self.rows,
                dp_rank=groups.dp_rank,
                dp_size=groups.dp_size,
                multiple=micro_batch_multiple(config.parallel),
            )
            weight = config.diffusion.next_token_weight
            yield [load_micro_batch(self.dataset, n, seed=0, next_token_weight=weight) for n in numbers]


def text_of(record: dict[str, Any], seconds: float) -> str:
    """A record for the console, one line."""

    def slots(name: str) -> str:
        found = [x for key, x in record.items() if key.startswith(f"val_{name}_pos_")]
        return " ".join(f"{x:.3f}" for x in found)

    accepted = [f"{x:.2f} at {key.rpartition('_')[2]}" for key, x in record.items() if key.startswith("val_accepted_")]
    return (
        f"validation on {record['val_rows']} rows, {format_duration(seconds)}: loss {record['val_loss']:.4f}, slots "
        f"{slots('loss')}; right {slots('accuracy')}; tokens a pass {', '.join(accepted)}"
    )
