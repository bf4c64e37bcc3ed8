"""A step of any rank without GPUs (`sdlm plan --simulate`), and configurations that it or the checks before refuse."""

import json
import re
from pathlib import Path

import pytest
from helpers import make_dataset, run_python

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner import plan

SHORT = ["--assume", "row_length=128"]
STAGES = [
    *("--model.num_layers=6", "--model.hidden_size=256", "--train.precision=bf16", "--train.global_batch=6"),
    *("--parallel.tensor=2", "--parallel.sequence=true", "--parallel.pipeline=3", "--parallel.virtual_pipeline=2"),
    *("--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true"),
]
SIMULATED: list[tuple[int, list[str], str, list[int]]] = [  # GPUs, settings; the error, or the ranks that pass
    (3, ["--train.recompute=selective", "--parallel.distributed_optimizer=false"], "", [0, 2]),
    (12, STAGES, "", [0, 4, 11]),
    (12, [*STAGES, "--parallel.context=2"], "", [0, 4, 11]),
    (8, [*STAGES, "--parallel.pipeline=2", "--parallel.virtual_pipeline=3", "--lora.rank=4"], "", [0, 7]),
    (2, ["--model.head_dim=15"], "rank 0 .* RuntimeError: Attempting to broadcast a dimension of length 16", []),
]
SIX = ["--model.num_attention_heads=6"]
REFUSED = {
    "2 GPUs are fewer than tensor x pipeline x context = 4": ["--parallel.tensor=4"],
    "3 processes are not a multiple of tensor 2 x pipeline": ["--parallel.tensor=2", "--gpus=3"],
    "num_attention_heads = 6 is not divisible": [*SIX, "--parallel.tensor=4", "--gpus=4"],
    "3 KV heads cannot be split": [*SIX, "--model.num_query_groups=3", "--parallel.tensor=2"],
    "model.num_layers = 3 is not divisible": ["--model.num_layers=3", "--parallel.pipeline=2"],
    "only one stage": ["--parallel.virtual_pipeline=2"],
    "sequence parallelism needs tensor": ["--parallel.sequence=true"],
    "row_length = 127 is not divisible": ["--parallel.tensor=2", "--parallel.sequence=true", "--assume=row_length=127"],
    "needs distributed_optimizer": ["--parallel.overlap_param_gather=true", "--parallel.distributed_optimizer=false"],
    "a model chunk has 2 layers": ["--train.recompute=full", "--train.recompute_layers=3"],
    "FP8 needs multiples of 16": ["--fp8", "--train.precision=bf16", "--model.ffn_hidden_size=164"],
    "there is no rank 2 of 2": ["--rank=2"],
}


def test_simulated_steps_show_fixed_memory_and_errors() -> None:
    cases = [("tiny", gpus, [*SHORT, *settings]) for gpus, settings, *_ in SIMULATED]
    done = run_python("tests/simulated_plans.py", json.dumps(cases))
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    for (_, _, error, passed), document in zip(SIMULATED, documents, strict=True):
        assert re.search(error, document.get("error", "")), document
        ranks = document.get("simulated", [])
        assert [rank["rank"] for rank in ranks] == passed
        for rank in ranks:
            assert {name: rank[name] for name in rank["planned"]} == pytest.approx(rank["planned"], rel=0.02)


@pytest.mark.parametrize("reason", REFUSED)
def test_wrong_configuration_is_refused_before_the_simulation(reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan.main(["tiny", "--gpus=2", "--train.steps=3", "--top=0", "--simulate", *REFUSED[reason]])


def test_a_warm_up_longer_than_the_dataset_is_refused(tmp_path: Path) -> None:
    """Without a dataset the steps of an epoch are not known, and the simulation accepts the warm-up."""
    data = make_dataset(tmp_path / "data", rows=20)
    length = ["--train.epochs=1", "--schedule.warmup_steps=9"]
    with pytest.raises(ConfigError, match="9 warm-up steps and 0 decay steps do not fit into the 5 steps"):
        plan.main(["tiny", "--gpus=2", f"--data={data}", "--top=0", "--simulate", *length])
