"""Planner: invariants, figures of the mixture, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_micro_batch, make_dataset, make_hf, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlm_megatron.config.load import PRESETS, load_config, save_config
from sdlm_megatron.config.schema import CheckpointConfig, RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.layout import IGNORE, block_count, draw_starts, next_token_targets, pack_row
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner import plan as command
from sdlm_megatron.planner import plan_text
from sdlm_megatron.planner.assumptions import Assumptions, assume, device_of, ranges
from sdlm_megatron.planner.memory import in_flight, peak_memory, stage_parameters
from sdlm_megatron.planner.parallel_layout import MEGATRON, TRANSFORMER_ENGINE, ParallelLayout, layout_of
from sdlm_megatron.planner.search import CLOSE, LayoutPlan, Planner, recommended
from sdlm_megatron.planner.step_time import gpu_time, host_time, launches
from sdlm_megatron.planner.workload import dataset, mixture, rows_per_step, steps, workload
from sdlm_megatron.weights.hf_config import HFConfig, config_json, family_of, read_hf_config

GIVEN = Assumptions()


def planner(preset: str = "sdlm_32b_d4", gpu: str = "h100", assumed: Assumptions = GIVEN, **train: object) -> Planner:
    config = load_config(RunConfig, preset, [f"--train.{k}={v}" for k, v in train.items()], PRESETS)
    work = mixture(config.diffusion.block_size or 4, config.diffusion.causal_attn, assumed)
    return Planner(config, work, device_of(gpu, assumed), assumed)


BIG = planner()
LAYER = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648
"""Weights of a layer of Qwen2.5-32B."""


def preset(gpus: int, *texts: str, **train: object) -> LayoutPlan:
    """The plan of the 32B preset's layout, TP 4 x PP 2 x VPP 4."""
    config = [f"--train.{k}={v}" for k, v in train.items()]
    p = replace(planner(assumed=assume(texts)), config=load_config(RunConfig, "sdlm_32b_d4", config, PRESETS))
    return replace(p, ranges=ranges(texts)).plan(layout_of(p.config, gpus))


def test_fp32_runs_have_the_speed_the_layers_and_the_attention_of_fp32():
    assert layout_of(load_config(RunConfig, "tiny", [], PRESETS), 2).kernels is MEGATRON
    bf16, fp32, tf32 = (
        preset(160, "kernel_overhead_us=0", precision=precision, layers=layers, micro_batches=8).time
        for precision, layers in (("bf16", "auto"), ("fp32", "auto"), ("fp32", "transformer_engine"))
    )
    assert fp32.gemm / bf16.gemm == pytest.approx(989.4 / 67) == fp32.attention / bf16.attention
    assert (tf32.gemm / bf16.gemm, tf32.attention) == (pytest.approx(2), fp32.attention)
    plans = planner("tiny").best(4)
    assert {(p.layout.context, p.layout.kernels.name) for p in plans} == {(1, "megatron")}
    with pytest.raises(ConfigError, match="no attention kernel for parts of rows supports fp32"):
        planner("tiny").check(plans[0].layout.change(context=2))


@pytest.mark.parametrize(("layers", "counted"), [("transformer_engine", 7_291), ("megatron", 15_163)])
def test_launches_are_the_counted_ones_and_the_host_is_hidden(layers, counted):
    plan = preset(232, layers=layers, micro_batches=6)
    assert plan.micro_batches * 32 * launches(plan.costs) == pytest.approx(counted, rel=0.01)
    assert host_time(plan.costs) == pytest.approx(32 * 4.2e-3)
    assert gpu_time(plan.costs) > host_time(plan.costs)
    assert plan.time.host < 0.001  # launches of Megatron-Core's layers show in the bubble, where no head hides them


def test_a_slow_host_decides_the_time_of_a_pass():
    for gpus, micro_batches in ((160, 8), (208, 6)):  # the bubble is a fourth of a pass
        plan = preset(gpus, "host_ms=50")
        items = dict(vars(plan.time))
        for outside in ("pipeline_communication", "data_communication", "optimizer", "overhead", "imbalance"):
            del items[outside]
        assert plan.micro_batches == micro_batches
        assert sum(items.values()) == pytest.approx((micro_batches + 1 / 4) * 32 * 50e-3)
    again = preset(160, "host_ms=50", recompute="full", recompute_layers=4)  # 4 of the 8 layers of a chunk
    assert host_time(again.costs) == pytest.approx((32 + 16 / 3) * 50e-3)
    assert preset(160, "host_ms=5").time.host == 0


def test_a_group_that_leaves_its_node_has_the_speed_of_the_network():
    """TP 4; nodes of 6 GPUs hold some groups only in part."""
    near, *split = (preset(64, f"gpus_per_node={n}").time.tensor_communication for n in (8, 2, 6))
    assert min(split) > 2 * near


def test_traffic_of_fp32_gradients():
    """Accumulation of weight gradients per micro-batch; zeroing, scaling, norm, clipping and Adam once per step."""
    speed = 3.35e12 * 0.8
    owned = LAYER * 32 // 4
    assert preset(160).time.weight_gradients == pytest.approx(8 * 8 * owned / speed)
    assert preset(160, layers="megatron").time.weight_gradients == pytest.approx(8 * 10 * owned / speed)
    full = preset(160, recompute="full").time  # the gradients are not computed again
    assert full.recompute == pytest.approx((full.gemm + full.attention + full.elementwise) / 3)
    count = owned + 32 * (2 * 5120 + (5120 + 2 * 1024) // 4) + 152_064 // 4 * 5120
    assert preset(160).time.optimizer == pytest.approx((4 + (8 + 4 + 8 + 28 + 2) / 20) * count / speed, rel=1e-4)
    # 3,641 label rows are 3 chunks of at most 1,683: one made fp32, two added, scaled, made bf16, added to the sum
    rows, table = BIG.work.row.label_rows, 152_064 // 4
    products = 6 * 5120 * table * rows / (989.4e12 * 0.7)
    head = products + (20 * rows + (6 + 2 * 8 + 8 + 6 + 10) * 5120) * table / speed
    assert preset(160).time.head == pytest.approx(8 * head)


def test_bf16_gradients_halve_buffers_and_traffic():
    fp32, bf16 = (preset(232, micro_batches=6, gradient_dtype=kind) for kind in ("fp32", "bf16"))
    assert bf16.memory.gradients == bf16.memory.weights == fp32.memory.gradients / 2
    assert bf16.memory.total == pytest.approx(fp32.memory.total - fp32.memory.gradients / 2)
    assert bf16.time.weight_gradients == fp32.time.weight_gradients / 2
    assert 0.05 < bf16.time.data_communication / fp32.time.data_communication < 0.5  # a fixed part of a pass hides it
    assert bf16.layout.settings()["train.gradient_dtype"] == "bf16"
    # one rank, all layers recomputed: the update reads all gradients in fp32, which are more than the activations
    alone = preset(8, gradient_dtype="bf16", recompute="full").memory
    assert alone.activations + alone.working + alone.logits == pytest.approx(2 * alone.gradients, rel=1e-3)


def test_memory_of_gpus_is_what_programs_see():
    """torch reports 79.1 GiB, 139.8 GiB and 178.4 GiB."""
    for gpu, gib in (("h100", 79.15), ("h200", 139.8), ("b200", 178.35)):
        assert device_of(gpu, GIVEN).memory == pytest.approx(gib * 2**30, rel=0.003)


def test_the_mixture_counts_the_chat_template():
    """Qwen2.5: 11 tokens of the default system turn, 5 each of a user and an assistant turn."""
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    turns = [[151644, role, 198, 151645, 198] for role in (872, 77091)]
    assert GIVEN.template_tokens == len(system) + sum(map(len, turns))
    exact = mixture(4, False, assume(["length_spread=0"]))
    assert exact.clean_tokens == pytest.approx(2_322_943_969 + 21 * 3_506_808)
    bare = preset(208, "template_tokens=0")
    assert (bare.rows, bare.micro_batches) == (156, 6)
    assert (preset(208).rows, preset(208).micro_batches) == (160, 6)


def test_rows_of_a_step_fill_the_grid():
    """Tokens of a rank are those of the dataset's rows, with little padding; explicit micro-batches are kept."""
    for gpus in (32, 64, 208, 232):
        plan = preset(gpus)
        assert plan.padding < 0.03
        content = plan.rows * (BIG.work.row.clean + BIG.work.row.block) / plan.layout.data
        assert plan.micro_batches * plan.grid.row_length * (1 - plan.padding) == pytest.approx(content)
        assert plan.time.gemm - 100 * 32 * plan.micro_batches * 2e-6 == pytest.approx(
            preset(160).time.gemm * plan.micro_batches * plan.grid.row_length / (8 * 5632), rel=0.05
        )
    more = preset(232, micro_batches=6)
    assert (more.micro_batches, more.grid.row_length) == (6, 5632)
    assert more.memory.activations < preset(232).memory.activations
    assert any(p.layout.train.micro_batches for p in BIG.best(232))  # the search knows shorter rows, too
    assert "4 micro-batches for each of 29" in plan_text.batch_note(preset(232))
    alone = planner("qwen2.5-0.5b", assumed=assume(["row_length=1024"]), global_batch=1)  # one row, less than filled
    assert alone.plan(layout_of(alone.config, 1)).seconds > 0


def test_more_gpus_than_rows_or_documents_are_named():
    """464 documents are packed into 160 rows; only a mean over rows keeps the rows."""
    idle = "{} per step, so TP x PP x CP must be at least {}, or GPUs stay idle"
    assert "below 2, ranks outnumber full rows" in plan_text.batch_note(preset(232))
    assert idle.format("documents", 3) in plan_text.batch_note(preset(1024))
    assert idle.format("rows", 2) in plan_text.batch_note(preset(232, loss_normalization="rows"))
    assert "outnumber" not in plan_text.batch_note(preset(64))


def test_the_rank_with_most_visible_pairs_decides():
    plan = preset(232)
    assert 1 < plan.spread[1] < 1.1 < plan.spread[0]
    assert plan.time.imbalance == pytest.approx(plan.time.attention * (plan.spread[1] - 1))


def test_ranges_give_a_band():
    plan = preset(64, "template_tokens=21")
    fast, slow = plan.band
    assert fast.seconds < plan.seconds < slow.seconds
    worst = "gemm_efficiency=0.55 attention_efficiency=0.12 memory_efficiency=0.6 host_ms=8 nvlink_efficiency=0.55 "
    worst += "network_gb=20 hidden_dp=0.5 straggler=0.08 template_tokens=21"
    assert slow.seconds == pytest.approx(preset(64, *worst.split()).seconds)
    assert preset(64, *worst.split()).band[0].seconds == pytest.approx(slow.seconds)  # no range is left
    assert assume(["gemm_efficiency=0.5..0.6"]).gemm_efficiency == pytest.approx(0.55)
    assert assume(["gemm_efficiency=0.6..0.8"]).gemm_efficiency == 0.7
    assert ranges(["fill=0.9..0.99", "host_ms=5"]).keys() == {*ranges([]), "fill"} - {"host_ms"}
    for wrong in ("fill=0.9..0.8", "fill=0.9..2", "fill=0.9..x", "fill=..1"):
        with pytest.raises(ConfigError):
            assume([wrong])


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    """Strategy: layouts of the 32B model."""
    tensor, pipeline = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4, 8]))
    kind = draw(st.sampled_from(["none", "selective", "full"]))
    sharded = draw(st.booleans())
    gpus = tensor * pipeline * draw(st.sampled_from([1, 2, 3, 8, 29]))
    kernels = draw(st.sampled_from([MEGATRON, TRANSFORMER_ENGINE]))
    return layout_of(RunConfig(), gpus, kernels).change(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=draw(st.sampled_from([1, 2, 4])) if pipeline > 1 else 1,
        sequence=tensor > 1 and draw(st.booleans()),
        distributed_optimizer=sharded,
        overlap_grad_reduce=draw(st.booleans()),
        overlap_param_gather=False,
        overlap_tensor=False,
        recompute=kind,
        recompute_layers=draw(st.integers(0, 4)) if kind == "full" else 0,
        logits_mb=draw(st.sampled_from([128, 512, 4096])),
    )


@settings(max_examples=60)
@given(layouts())
def test_memory_options_never_increase_memory(layout):
    """Each memory-saving option never increases memory, for any layout."""
    needed = BIG.memory(layout).total
    bare = layout.with_recompute("none")
    assert needed <= BIG.memory(bare).total
    by_layers = [BIG.memory(layout.with_recompute("full", k)).total for k in (1, 2, 3, 4)]
    assert by_layers == sorted(by_layers, reverse=True)
    if layout.tensor > 1:
        work = BIG.work.row
        on = peak_memory(BIG.model, layout.change(sequence=True), work, 8)
        off = peak_memory(BIG.model, layout.change(sequence=False), work, 8)
        assert on.activations <= off.activations
    sharded, whole = (layout.change(distributed_optimizer=x) for x in (True, False))
    assert BIG.memory(sharded).optimizer <= BIG.memory(whole).optimizer
    assert BIG.memory(layout.change(logits_mb=64)).logits <= BIG.memory(layout).logits + 64e6


@pytest.mark.parametrize(
    ("gpus", "micro_batches", "recompute", "peak"), [(232, 6, "none", 54.62), (64, 20, "selective", 58.05)]
)
def test_fp8_memory_is_that_of_the_null_gpu(gpus, micro_batches, recompute, peak):
    """GB of rank 0, as in docs/benchmarks.md; the difference to bf16 is counted by hand."""
    train = {"recompute": recompute, "micro_batches": micro_batches}
    plans = [preset(gpus, **train, fp8=fp8) for fp8 in ("none", "current")]
    plain, quantized = (p.memory for p in plans)
    assert quantized.total == pytest.approx(peak * 1e9, rel=0.005)
    # on TP 4, one byte less for the inputs after norms and SwiGLU, one more for the input after attention
    norms, attention, swiglu = 2 * 5632 * 5120 // 4, 5632 * 5120 // 4, 5632 * 27648 // 4
    freed = swiglu - attention + (norms if recompute == "none" else 0)
    chunks = 9  # in flight, of 8 layers each
    assert plain.activations - quantized.activations == pytest.approx(chunks * 8 * freed)
    assert quantized.buffers - plain.buffers == 2 * LAYER * 32 // 4


@settings(max_examples=60)
@given(layouts())
def test_items_sum_to_the_total_and_time_is_positive(layout):
    plan = BIG.plan(layout)
    assert sum(plan.memory.items().values()) == pytest.approx(plan.memory.total)
    assert min(plan.memory.items().values()) >= 0
    assert sum(vars(plan.time).values()) == pytest.approx(plan.time.total)
    assert min(vars(plan.time).values()) >= 0
    assert 0 < plan.mfu < GIVEN.gemm_efficiency
    # lower bound: all GPUs at the speed of their matrix products
    assert plan.seconds >= plan.flops / (layout.gpus * BIG.device.peak * GIVEN.gemm_efficiency)
    assert plan.micro_batches % layout.parallel.group == 0 and 0 <= plan.padding < 1 <= min(plan.spread)


def test_more_memory_never_makes_a_layout_infeasible():
    small = planner(assumed=assume(["capacity_gb=40"])).best(64)
    large = planner(assumed=assume(["capacity_gb=80"])).best(64)
    keys = [
        {(p.layout.tensor, p.layout.pipeline, p.layout.virtual, p.layout.parallel.sequence) for p in x}
        for x in (small, large)
    ]
    assert keys[0] < keys[1]
    assert large[0].seconds <= small[0].seconds


DELAYED = planner("qwen2.5-3b", assumed=assume(["capacity_gb=42"]), fp8="delayed")


@pytest.mark.parametrize(("planned", "gpus"), [(BIG, 16), (BIG, 232), (BIG, 4096), (DELAYED, 4)])
def test_ranked_layouts_fit_and_are_valid_for_training(planned, gpus):
    plans = planned.best(gpus)
    assert plans
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    for plan in plans:
        assert plan.fits
        planned.check(plan.layout)
    choice = recommended(plans)
    assert choice in plans
    assert choice.seconds <= plans[0].seconds * (1 + CLOSE)


def test_recomputation_is_the_minimum_that_fits():
    plans = planner(layers="megatron").best(32)
    some = [p for p in plans if p.layout.train.recompute_layers]
    assert some
    for plan in some:
        less = plan.layout.with_recompute("full", plan.layout.train.recompute_layers - 1)
        less = less if less.train.recompute_layers else plan.layout.with_recompute("none")
        assert not BIG.plan(less).fits


def test_faster_machines_and_fewer_rows():
    h100, h200, b200 = (planner(gpu=gpu).best(64)[0].seconds for gpu in ("h100", "h200", "b200"))
    assert b200 < h200 <= h100
    fast = replace(BIG.config, train=replace(BIG.config.train, fp8="current"))
    assert replace(BIG, config=fast).best(64)[0].seconds < h100
    # no rounding: the documents of 160 rows fill the rows of 29 ranks as those of 27
    layout = layout_of(BIG.config, 232).change(virtual_pipeline=1)
    wide, narrow = BIG.plan(layout), BIG.plan(replace(layout, gpus=216))
    assert max(wide.padding, narrow.padding) < 0.03
    assert wide.time.gemm / narrow.time.gemm == pytest.approx(27 / 29, rel=0.03)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches", "expected"),
    [(1, 1, 8, [1]), (4, 1, 8, [4, 3, 2, 1]), (4, 1, 2, [2, 2, 2, 1]), (2, 2, 8, [5, 3]), (4, 2, 2, [4, 4, 4, 4])],
)
def test_forward_passes_in_flight(pipeline, virtual, micro_batches, expected):
    layout = layout_of(BIG.config, 64).change(pipeline=pipeline, virtual_pipeline=virtual)
    assert [in_flight(layout, micro_batches, stage) for stage in range(pipeline)] == expected


def test_the_mixture_has_the_recipes_steps():
    for preset, published in (("sdlm_3b_d4", 13_699), ("sdlm_3b_d8", 13_699), ("sdlm_32b_d4", 7_558)):
        p = planner(preset)
        assert steps(p.config, p.work, rows_per_step(p.config, p.work)) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("d", [4, 8])
def test_the_mixture_agrees_with_documents_drawn_from_it(d):
    work, rng = mixture(d, False, GIVEN), np.random.default_rng(0)
    mean = GIVEN.content_tokens / GIVEN.documents + GIVEN.template_tokens
    clean = block = pairs = 0
    for i in range(3000):
        length = int(min(max(16, rng.lognormal(np.log(mean) - 0.32, 0.8)), 5632 - d))
        anchors = np.arange(length - int(0.68 * length), length - 1)
        n = block_count(length, len(anchors), 5632, d, 3)
        starts = draw_starts(anchors, n, seed=0, epoch=0, document=i)
        layout = pack_row([(i, np.zeros(length, np.int32), starts)], block_size=d, mask_token_id=0)[1]
        clean, block, pairs = clean + length, block + layout.n_block_tokens, pairs + visible_pairs(layout)
    assert block / clean == pytest.approx(work.row.block / work.row.clean, rel=0.02)
    assert pairs / (clean + block) == pytest.approx(work.pairs / (work.row.clean + work.row.block), rel=0.06)


def test_dataset_is_counted(tmp_path: Path):
    path = make_dataset(tmp_path / "data", rows=20)
    data, work = PackedDataset(path), dataset(str(path), causal_attn=False)
    layouts = [data.read(0, i)[1] for i in range(20)]
    assert work.rows == 20
    assert work.useful_tokens == sum(x.used for x in layouts)
    assert work.pairs * 20 == sum(visible_pairs(x) for x in layouts)
    assert work.documents_per_row == data.manifest["mean_documents_per_row"]
    assert work.row.label_rows == work.row.targets


def test_targets_of_clean_tokens_are_counted(tmp_path: Path):
    """Exact for a dataset; the mixture's estimate matches documents drawn from it; the targets increase step time."""
    path = make_dataset(tmp_path / "data", rows=20)
    rows = [load_micro_batch(PackedDataset(path), n, seed=0, next_token_weight=1.0) for n in range(20)]
    work = dataset(str(path), causal_attn=False, next_token=True)
    assert round(work.row.label_rows * 20) == sum(len(r.label_index) for r in rows)
    for repeat in (1, 2):
        assumed = assume(["length_spread=0", f"repeat={repeat}"])
        length = round(assumed.content_tokens / assumed.documents + assumed.template_tokens)
        anchors = np.arange(length)[-round(assumed.response_share * length) - 1 : -1]
        n, target_count = block_count(length, len(anchors), 5632, 4, repeat), 0
        for i in range(100):
            starts = draw_starts(anchors, n, seed=0, epoch=0, document=i)
            row = pack_row([(i, np.zeros(length, np.int32), starts)], block_size=4, mask_token_id=0)
            target_count += int((next_token_targets(*row, eos_token_id=1) != IGNORE).sum())
        estimate = mixture(4, False, assumed, next_token=True).row
        share = estimate.next_token_targets / estimate.response
        assert 0.6 < share < 0.95
        assert target_count / 100 / len(anchors) == pytest.approx(share, rel=0.01)
    on = load_config(RunConfig, "sdlm_3b_d4", ["--diffusion.next_token_weight=0.1"], PRESETS)
    more = Planner(on, workload(on, "", GIVEN), device_of("h100", GIVEN), GIVEN)
    less = planner("sdlm_3b_d4")
    layout = less.best(16)[0].layout
    assert more.plan(layout).flops > less.plan(layout).flops
    assert more.plan(layout).time.head > less.plan(layout).time.head
    assert more.memory(layout).total >= less.memory(layout).total


def test_assumptions_are_listed(capsys: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match="did you mean gemm_efficiency"):
        assume(["gem_eficiency=0.5"])
    for wrong in ("gemm_efficiency=fast", "gemm_efficiency=1.5", "fill=-1", "repeat=0", "network_gb=inf"):
        with pytest.raises(ConfigError):
            assume([wrong])
    assert assume(["gemm_efficiency=0.5", "network_gb=25"]).network_gb == 25
    command.main(["sdlm_3b_d4", "--gpus", "16", "--top", "1", "--assume", "straggler=0.5", "--assume", "fill=.9..1"])
    assert "assumptions: straggler=0.5, fill=0.9..1, otherwise defaults" in capsys.readouterr().out
    assert "straggler" in command.build_parser().format_help()


def test_the_command_prints_json(capsys: pytest.CaptureFixture):
    options = ["--train.recompute=full", "--fp8", "--top=2", "--assume=host_ms=20"]
    command.main(["sdlm_3b_d4", "--gpus", "32", "--json", "--price", "2", *options])
    printed = json.loads(capsys.readouterr().out)
    assert printed["preset_layout"]["settings"]["train.recompute"] == "full"
    assert printed["preset_layout"]["settings"]["train.fp8"] == "current"
    assert len(printed["best"]) == 2
    low, high = printed["best"][0]["band_gpu_hours"]
    assert low < printed["best"][0]["gpu_hours"] < high
    assert printed["best"][0]["host_binds"]
    assert printed["recommended"]["cost_usd"] == pytest.approx(2 * printed["recommended"]["gpu_hours"])


LONG = ("row_length=131072", "documents=20000", "content_tokens=1e9")


def long(context: int, gpus: int = 64, *texts: str, **train: object) -> LayoutPlan:
    """The plan of 32B on rows of 131,072 tokens with TP 8, sequence parallelism and this degree of CP."""
    config = load_config(RunConfig, "sdlm_32b_d4", [f"--train.{k}={v}" for k, v in train.items()], PRESETS)
    degrees = {"tensor": 8, "pipeline": 1, "virtual_pipeline": 1, "context": context}
    config = replace(config, parallel=replace(config.parallel, **degrees))
    p = replace(planner(assumed=assume([*LONG, *texts])), config=config)
    return p.plan(layout_of(config, gpus))


@pytest.mark.parametrize("context", [2, 8])
def test_context_parallelism_divides_what_grows_with_the_row(context):
    """Activations, buffers and time of a row by N; weights and gradients stay; the optimizer is sharded as before."""
    whole, split = (long(n, 64, "kernel_overhead_us=0") for n in (1, context))
    for name in ("activations", "buffers"):
        assert getattr(split.memory, name) == pytest.approx(getattr(whole.memory, name) / context, rel=0.002)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(split.memory, name) == getattr(whole.memory, name)
    # as many rows: each takes 1/N of the time on N times as many GPUs
    for name in ("gemm", "attention", "elementwise"):
        expected = getattr(whole.time, name) / whole.micro_batches * split.micro_batches / context
        assert getattr(split.time, name) == pytest.approx(expected, rel=0.02), name
    assert (split.layout.data, split.layout.replicas) == (8 // context, 8)


def test_keys_and_values_of_context_parallelism_travel_three_times():
    """Gathered in both passes, scattered once; again for recomputed layers. 8 KV heads over TP 8: 128 numbers each."""
    work = long(8).planner.work
    count = 2 * work.row.clean * 128 * 2 * 7 / 8
    for train, times in ({}, 3), ({"recompute": "full"}, 4):
        plan = long(8, **train)
        per_layer = plan.time.context_communication / plan.micro_batches / 64
        # TP 8 fills a node: a neighbor of the row is on another one
        rows = plan.rows / (plan.grid.ranks * plan.grid.micro_batches)
        assert per_layer == pytest.approx(times * (count * rows / 40e9 + 20e-6), rel=1e-3)
    near = long(8, 64, "gpus_per_node=64").time.context_communication
    assert near < 0.2 * long(8).time.context_communication
    assert long(1).time.context_communication == 0


def test_long_rows_of_32b_get_context_parallelism():
    plans = planner(assumed=assume(LONG), layers="transformer_engine").best(16)
    choice = recommended(plans)
    assert choice is not None and choice.fits and choice.layout.context > 1
    assert {p.layout.context for p in plans} == {1, 2}


def test_impossible_layout_is_reported(capsys: pytest.CaptureFixture):
    command.main(["sdlm_32b_d4", "--gpus", "20", "--parallel.tensor=8", "--parallel.virtual_pipeline=1", "--top", "1"])
    assert "cannot run on 20 GPUs: 20 processes are not a multiple" in capsys.readouterr().out
    command.main(["qwen2.5-72b", "--gpus", "2"])
    assert "no layout fits" in capsys.readouterr().out
    command.main(["sdlm_32b_d4", "--gpus", "64", "--train.fp8=delayed"])
    printed = capsys.readouterr().out
    assert "training accepts no layout: delayed FP8" in printed and "no layout fits" not in printed
    assert printed.count("set observe.sample_every=0") == 2
    with pytest.raises(ConfigError, match="num_layers"):
        command.main([str(PRESETS / ".." / "presets" / "tiny.yaml"), "--gpus", "2", "--model.num_layers=0"])


def test_the_shape_is_read_from_the_base(tmp_path: Path, capsys: pytest.CaptureFixture):
    """As in training, a configuration without sizes takes them from checkpoint.base."""
    file, base = tmp_path / "own.yaml", make_hf(tmp_path / "base", layers=2)
    file.write_text("diffusion: {block_size: 4}\n")
    command.main([str(file), "--gpus", "2", f"--checkpoint.base={base}"])
    assert "recommended" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="num_layers is 0"):
        command.main([str(file), "--gpus", "2"])
    with pytest.raises(ConfigError, match=r"model\.\w+ is \d+, the base has"):
        command.main(["tiny", "--gpus", "2", f"--checkpoint.base={base}"])
    command.main(["tiny", "--gpus", "2", f"--checkpoint.base={tmp_path / 'elsewhere'}"])
    shape = read_hf_config(base).shape
    shape = replace(shape, vocab_size=shape.vocab_size - 1)  # without the mask token's row
    save_config(RunConfig(model=shape, checkpoint=CheckpointConfig(base=str(base))), file)
    command.main([str(file), "--gpus", "2"])
    with pytest.raises(ConfigError, match="model.vocab_size is"):
        command.main([str(file), "--gpus", "2", f"--model.vocab_size={shape.vocab_size - 1}"])


def test_invalid_value_is_an_error():
    with pytest.raises(ConfigError, match="train.attention is 'fast'"):
        command.main(["tiny", "--gpus", "2", "--train.attention=fast"])
    with pytest.raises(ConfigError, match="Triton kernels only, not dense"):
        command.main(["tiny", "--gpus", "2", "--train.attention=dense"])


def test_planner_imports_neither_torch_nor_megatron():
    code = "import sys, sdlm_megatron.planner.plan as p; p.main(['tiny', '--gpus', '2', '--train.steps=3']); "
    done = run_python("-c", code + "assert not {'torch', 'megatron'} & set(sys.modules), 'imported'")
    assert "recommended" in done.stdout


# Elements of the published weights.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_parameters_of_the_published_models(name: str) -> None:
    """By the planner, and by transformers for the config.json of an export."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = load_config(RunConfig, name, [], PRESETS)
    assert sum(map(sum, stage_parameters(config.model, layout_of(config, 1), 0))) == PUBLISHED[name]
    values = config_json(HFConfig(family_of(config.model), config.model, None), "bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    assert model.num_parameters() == PUBLISHED[name]
