"""Six steps under every layout from the same weights: losses and gradient norms agree."""

import json
import time
from pathlib import Path

import pytest
import torch
from helpers import EOS, FAMILY_FIELDS, MASK, make_dataset, make_hf, read_metrics, run_python, train
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

pytestmark = pytest.mark.distributed

STEPS = 6
# name -> (processes, settings). 5 rows per step is no multiple of DP 2, so one empty row is added.
TP2 = {"parallel.tensor": 2, "parallel.sequence": True}
OVERLAPPED = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "TP1": (1, {}),
    "TP2+SP": (2, TP2),
    "PP2": (2, {"parallel.pipeline": 2}),
    # 10 label rows per chunk
    "TP2+SP+PP2, head in chunks": (
        4,
        {**TP2, "parallel.pipeline": 2, "train.logits_mb": 0.02},
    ),
    "DP2 replicated optimizer": (2, {"parallel.distributed_optimizer": False}),
    "DP2 distributed optimizer": (2, {}),
    "TP2+SP, selective recompute": (2, {**TP2, "train.recompute": "selective"}),
    "PP2, one layer per stage recomputed": (
        2,
        {"parallel.pipeline": 2, "train.recompute": "full", "train.recompute_layers": 1},
    ),
    "DP2 overlapped, with samples": (2, {**OVERLAPPED, "observe.sample_every": 3, "observe.validate_every": 3}),
    "TP4, more than KV heads": (4, {"parallel.tensor": 4}),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    make_dataset(folder / "validation", rows=9, seed=3)
    # untied here; the tied head is tested below and in test_resume.py
    return make_dataset(folder / "data", rows=22), make_hf(folder / "hf", tied=False, layers=4)


def run(material: tuple[Path, Path], run_dir: Path, processes: int, settings: dict[str, object]) -> list[dict]:
    data, base = material
    common = {
        "run_dir": run_dir,
        "data.path": data,
        "checkpoint.base": base,
        "model.num_layers": 0,  # read the shape from the base
        "train.steps": STEPS,
        "train.global_batch": 5,
        "checkpoint.save_every": 0,
        "observe.tensorboard": False,
        "observe.validate_every": 0,
        "observe.validation_rows": 8,  # of 9, and more than one step's 5
        "data.validation": data.with_name("validation") if "observe.validate_every" in settings else "",
    }
    train({**common, **settings}, processes=processes, entry=(str(Path(__file__).with_name("small_buckets.py")),))
    return read_metrics(run_dir)


@pytest.fixture(scope="module")
def single_run(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with samples and validation: the reference for layouts with and without them."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run(material, folder, 1, {"observe.sample_every": 3, "observe.validate_every": 3})
    return folder


@pytest.fixture(scope="module")
def single(single_run: Path) -> list[dict]:
    return read_metrics(single_run)


def samples(run_dir: Path) -> dict[int, list[dict]]:
    """Samples in samples.jsonl by step."""
    lines = (run_dir / "samples.jsonl").read_text().splitlines()
    return {r["step"]: r["samples"] for r in map(json.loads, lines)}


EXACT = ("targets", "useful_tokens", "documents", "consumed_rows", "epoch", "lr", "rows")
LEARNED = ("loss", "accuracy", "confidence", "accepted")


def validation(run_dir: Path) -> list[dict]:
    """Records of validation.jsonl without the prefix `val_`."""
    lines = (run_dir / "validation.jsonl").read_text().splitlines()
    return [{k.removeprefix("val_"): v for k, v in json.loads(line).items()} for line in lines]


def assert_equal(actual: list[dict], expected: list[dict], rel: float = 1e-5) -> None:
    assert [r["step"] for r in actual] == [r["step"] for r in expected]
    for record, reference in zip(actual, expected, strict=True):
        assert ("loss_next_token" in record) == ("loss_next_token" in reference)
        for key in (k for k in reference if k == "grad_norm" or k.startswith(LEARNED)):
            assert record[key] == pytest.approx(reference[key], rel=rel), f"step {record['step']}, {key}"
        for key in (k for k in EXACT if k in reference):
            assert record[key] == reference[key], f"step {record['step']}, {key}"


def test_single_process_run_learns(single: list[dict]) -> None:
    assert len(single) == STEPS
    assert single[-1]["loss"] < single[0]["loss"]
    assert single[-1]["epoch"] == 1  # 30 rows at 22 per epoch, and a step of both
    assert len({r["accuracy_pos_1"] for r in single}) > 2 and {"accepted_0.9", "accepted_0.98"} <= set(single[0])


def test_validation_is_logged_and_improves(single_run: Path) -> None:
    first, last = validation(single_run)
    assert (first["step"], last["step"], last["rows"]) == (3, 6, 8)
    assert 0 < last["loss"] < first["loss"] and {"loss_pos_4", "accuracy_pos_4", "accepted_0.9"} <= set(last)
    events = [json.loads(line) for line in (single_run / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["seconds"] > 0) for e in events if e["kind"] == "validated"] == [(3, True), (6, True)]


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "TP1"])
def test_layout_equals_single_process(
    name: str, material: tuple[Path, Path], single_run: Path, single: list[dict], tmp_path: Path
) -> None:
    assert_equal(run(material, tmp_path / "run", *LAYOUTS[name]), single)
    if "samples" in name:
        assert samples(tmp_path / "run") == samples(single_run)
        assert list(samples(single_run)) == [3, 6]
        assert_equal(validation(tmp_path / "run"), validation(single_run))
    else:
        assert not (tmp_path / "run" / "samples.jsonl").exists()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = FileSystemReader(folder)
    kept = reader.read_metadata().state_dict_metadata
    tensors = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in kept.items()
        if isinstance(m, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def test_interleaved_and_overlapped_run_resumes_on_one_process(
    material: tuple[Path, Path], single_run: Path, single: list[dict], tmp_path: Path
) -> None:
    """PP2 with two virtual stages and DP2 with every overlap (5 rows, so three of 8 are empty), then one process.

    Samples are drawn at step 2, which is followed by another step, and at step 3.
    """
    interleaved = {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, **OVERLAPPED, "train.stop_after": 3}
    interleaved["observe.sample_every"] = interleaved["observe.validate_every"] = 2
    run(material, tmp_path / "run", 4, interleaved)
    drawn = samples(tmp_path / "run")
    assert list(drawn) == [2, 3] and drawn[3] == samples(single_run)[3]
    *_, last = validation(tmp_path / "run")
    assert_equal([last], validation(single_run)[:1])
    assert_equal(run(material, tmp_path / "run", 1, {"train.recompute": "full"}), single)
    weights = f"ckpt/step-{STEPS:07d}/weights"
    resumed, reference = tensors_of(tmp_path / "run" / weights), tensors_of(single_run / weights)
    assert resumed.keys() == reference.keys()
    for name, tensor in reference.items():  # weights and both moments
        assert (resumed[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_log_and_save_intervals_do_not_change_training(
    material: tuple[Path, Path], single: list[dict], tmp_path: Path
) -> None:
    """Between log steps the host runs ahead; results are read and times measured over several steps at once."""
    started = time.perf_counter()
    records = run(material, tmp_path / "run", 1, {"observe.log_every": 3, "checkpoint.save_every": 2})
    seconds = time.perf_counter() - started
    assert_equal(records, [r for r in single if r["step"] in (3, 6)])
    assert 0 < sum(3 * r["step_time"] for r in records) < seconds
    for record in records:
        assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["step_time"])
        assert 0 <= record["data_wait"] < record["step_time"]
        parts = [record[f"time_{name}"] for name in ("forward_backward", "reduce", "update", "read_log")]
        assert all(x > 0 for x in parts)
        assert sum([*parts, record["data_wait"]]) == pytest.approx(record["step_time"])
    assert all(r["time_save"] > 0 for r in records)  # after steps 2 and 4


def test_next_token_loss_under_data_parallelism(
    material: tuple[Path, Path], single: list[dict], tmp_path: Path
) -> None:
    """DP2 with an empty row and a chunked head against one process; slot losses of step 1 equal those without it."""
    settings = {"diffusion.next_token_weight": 0.3, "train.next_token_balance": True, "train.steps": 3}
    alone = run(material, tmp_path / "alone", 1, settings)
    assert_equal(run(material, tmp_path / "spread", 2, {**settings, **OVERLAPPED, "train.logits_mb": 0.02}), alone)
    first, plain = alone[0], single[0]
    assert "loss_next_token" not in plain
    assert all(first[k] == plain[k] for k in ("loss_pos_1", "loss_pos_2", "loss_pos_3", "loss_pos_4", "targets"))
    assert first["loss"] > plain["loss"]
    assert alone[-1]["loss_next_token"] < first["loss_next_token"]


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_other_families_train_the_same_across_layouts(tmp_path: Path, family: str) -> None:
    """TP2+SP+PP2 against one process, and its samples against transformers with the export of the same step.

    Tied embeddings on two stages, loss averaged over rows for blocks and clean tokens, causal blocks. Each TP rank has
    the whole norms of q and k (Qwen3), and gradients of them from its own heads. SmolLM3's layer without rotary
    embedding is on the second stage; here it also has Llama 3's rope scaling, and Qwen3 has YaRN.
    """
    scaling = FAMILY_FIELDS["llama"] if family == "smollm3" else {}
    material = (
        make_dataset(tmp_path / "data", rows=20),
        make_hf(tmp_path / "hf", tied=True, family=family, causal_attn=True, **scaling),
    )
    settings = {
        "diffusion.causal_attn": True,
        "diffusion.next_token_weight": 0.5,
        "train.next_token_balance": True,
        "train.loss_normalization": "rows",
        "train.steps": 4,
    }
    layout = {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True}
    alone = run(material, tmp_path / "alone", 1, settings)
    spread, out = tmp_path / "spread", tmp_path / "out"
    assert_equal(run(material, spread, 4, {**settings, **layout, "observe.sample_every": 1000}), alone)
    run_python("-m", "checkpoints_tools.mcore_to_hf", "--ckpt", str(spread), "--out", str(out))
    (drawn,) = samples(spread).values()
    assert {tuple(s["tokens"]) for s in drawn} == {tuple(decoded(out, s["prompt_ids"])) for s in drawn}


def decoded(folder: Path, prompt: list[int]) -> list[int]:
    """Tokens decoded from a prompt by transformers' model without a cache."""
    from transformers import AutoModelForCausalLM

    from sdlm_megatron.diffusion.decode import decode
    from sdlm_megatron.training.evaluation_hooks import NEW_TOKENS, THRESHOLD

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    done = decode(
        model, torch.tensor([prompt]), mask_token_id=MASK, window=4, threshold=THRESHOLD, max_new_tokens=NEW_TOKENS,
        eos_token_ids=[EOS], causal_attn=True, use_cache=False,
    )  # fmt: skip
    return done.tokens[0]


def test_only_own_gradients_are_scaled(material: tuple[Path, Path], tmp_path: Path) -> None:
    """After the reduce-scatter; gradient norms and weights stay bitwise those of scaling the whole buffer."""
    script, out = str(Path(__file__).with_name("own_gradients.py")), tmp_path / "out.json"
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    settings = [{}, overlapped, {"distributed_optimizer": False}]
    run_python(script, *map(str, material), str(out), json.dumps(settings), processes=2)
    for parallel, results in zip(settings, json.loads(out.read_text()), strict=True):
        (_, share, norms), (_, other, _) = results
        assert all(same for same, *_ in results) and min(norms) > 0, parallel
        if parallel.get("distributed_optimizer", True):
            assert 0.3 < share < 0.7 and 0.3 < other < 0.7, parallel
        else:
            assert share > 0.99


def test_bf16_trains_under_pipeline(material: tuple[Path, Path], single: list[dict], tmp_path: Path) -> None:
    """bf16 with fp32 masters follows the fp32 run within bf16's rounding."""
    records = run(material, tmp_path / "run", 2, {"train.precision": "bf16", "parallel.pipeline": 2})
    assert_equal(records[:3], single[:3], rel=0.02)
    assert records[-1]["loss"] == pytest.approx(single[-1]["loss"], rel=0.1)


def test_bf16_gradients_train_and_resume(material: tuple[Path, Path], single: list[dict], tmp_path: Path) -> None:
    """DP 2 with every overlap and checks of the replicas, then PP 2: as `test_bf16_trains_under_pipeline`."""
    bf16 = {"train.precision": "bf16", "train.gradient_dtype": "bf16"}
    first = {**OVERLAPPED, "fault.replica_check_every": 2, "train.stop_after": 3}
    run(material, tmp_path / "run", 2, {**bf16, **first})
    records = run(material, tmp_path / "run", 2, {**bf16, "parallel.pipeline": 2})
    assert_equal(records[:3], single[:3], rel=0.02)
    assert records[-1]["loss"] == pytest.approx(single[-1]["loss"], rel=0.1)
