"""Context parallelism over gloo, by number of ranks: equality with whole rows, memory, CPU time and bytes sent.

`equal`   loss and gradient norm of two steps, and every gradient, of each layout, against one process with whole rows:
          the largest relative difference. A random model of 4 layers in fp32; rows of the mixture and of single
          documents, and an empty one.
`memory`  one layer of hidden size 64 with 2 heads and 1 KV head of dimension 16, a row with a single document: tensors
          kept for the backward pass, peak of all tensors (the CPU's attention kernel processes 16 queries at a time, so
          that its own memory stays small), CPU time of a rank, and bytes that a rank sends for keys and values.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dev.bench.timing import peak_bytes, print_table
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from sdlm_megatron.errors import run_cli
from sdlm_megatron.parallel import compat, cpu

if TYPE_CHECKING:
    from sdlm_megatron.diffusion.row import MicroBatch
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.parallel.groups import Groups

CP2, CP4 = {"context": 2}, {"context": 4}
TP2, PP2 = {"tensor": 2, "sequence": True}, {"pipeline": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP 2": (2, CP2),
    "CP 3": (3, {"context": 3}),
    "CP 4": (4, CP4),
    "CP 8": (8, {"context": 8}),
    "CP 2, DP 2": (4, CP2),
    "CP 2, DP 2, overlapped": (4, {**CP2, "overlap_grad_reduce": True}),
    "CP 2, TP 2 + SP": (4, {**CP2, **TP2}),
    "CP 2, PP 2": (4, {**CP2, **PP2}),
    "CP 2, PP 2 interleaved": (4, {**CP2, **PP2, "virtual_pipeline": 2}),
    "CP 4, TP 2 + SP": (8, {**CP4, **TP2}),
    "CP 2, TP 2 + SP, PP 2": (8, {**CP2, **TP2, **PP2}),
}
LAYERS, LENGTH, ROWS = 4, 1024, 8


def launch(processes: int, **job: Any) -> Any:
    """The result of rank 0 of this many processes."""
    with tempfile.TemporaryDirectory() as folder:
        job["out"] = str(Path(folder) / "out.pt")
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        line += ["-m", "dev.bench.context_parallel", "rank", json.dumps(job)]
        subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        return torch.load(job["out"], weights_only=False)


def run_rank(job: dict[str, Any]) -> None:
    """One process of a measurement."""
    compat.silence_known_notices()
    cpu.install()  # before anything imports megatron
    from sdlm_megatron.parallel.groups import close_groups, init_groups

    config = RunConfig(parallel=ParallelConfig(**job["parallel"]))
    config.train.precision, config.train.attention = "fp32", "decomposed"
    config.diffusion.block_size, config.diffusion.target_shift = 4, True
    groups = init_groups(config.parallel, seed=1)
    result: Any
    if job["kind"] == "memory":
        result = measure(config, groups, job)
    else:
        result = [compare(config, groups, job, by_row=False)]
        config.train.loss_normalization, config.diffusion.causal_attn = "rows", True
        config.diffusion.next_token_weight = 0.3
        result.append(compare(config, groups, job, by_row=True))
    if groups.main:
        torch.save(result, job["out"])
    close_groups()


# --- equality


def compare(config: RunConfig, groups: "Groups", job: dict[str, Any], *, by_row: bool) -> dict[str, Any]:
    """Losses and norms of two steps, and the gradients of the first.

    Gradients are whole tensors on one process, otherwise the largest difference from those of `job["reference"]`.
    """
    from sdlm_megatron.checkpoint import restore
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.weights.hf_config import read_hf_config

    base = Path(job["base"])
    result: dict[str, Any] = {}
    shape = read_hf_config(base).shape
    for sharded in (False, True):
        chosen = replace(config, parallel=replace(config.parallel, distributed_optimizer=sharded))
        engine = Engine(chosen, shape, groups, max_positions=LENGTH, steps=10, initialize=False)
        restore.load_base(base, engine, new_mask=None)
        rows = [engine.prepare(row) for row in step_rows(chosen, shape)[groups.dp_rank :: groups.dp_size]]
        if not sharded:
            engine.forward_backward(rows)
            reference = job["reference"] and torch.load(job["reference"])[by_row]["gradients"]
            result["gradients"] = difference(engine, reference) if reference else whole_gradients(engine)
        steps = [engine.results([engine.train_step(rows, step)])[0] for step in (1, 2)]
        result[f"losses, sharded={sharded}"] = [step.loss for step in steps]
        result[f"norms, sharded={sharded}"] = [step.grad_norm for step in steps]
    return result


def step_rows(config: RunConfig, shape: ModelConfig) -> list["MicroBatch"]:
    """ROWS rows: of the mixture, of one document each, and an empty one."""
    from dev.bench.engine_case import make_documents, pack_documents
    from sdlm_megatron.diffusion.layout import pack_row
    from sdlm_megatron.diffusion.row import make_micro_batch

    weight, rows = config.diffusion.next_token_weight, []
    for kind, samples in (("mixture", 6), ("full", 2)):
        documents = make_documents(kind, samples, LENGTH, shape, 4)
        rows += pack_documents(documents, LENGTH, shape, 4, next_token_weight=weight)
    nothing = pack_row([], block_size=4, mask_token_id=0)
    empty: dict[str, Any] = {"row_length": LENGTH, "pad_token_id": 0, "eos_token_id": 1, "next_token_weight": weight}
    return [*rows[: ROWS - 1], *[make_micro_batch(*nothing, **empty) for _ in range(ROWS - len(rows[: ROWS - 1]))]]


def regions(engine: "Engine") -> Iterator[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """This process's gradients: name and shape of the whole model's tensor, region of it, and the gradient there."""
    from sdlm_megatron.checkpoint.sharding import local_shards

    parameters: dict[int, Any] = {p.data_ptr(): p for module in engine.modules for p in module.parameters()}
    for shard in local_shards(engine, with_optimizer=False):
        gradient = parameters[shard.flat.data_ptr()].main_grad.view(-1)
        for placed, region in shard.regions(0, gradient.numel()):
            where = tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
            part = gradient[region.offset : region.offset + region.numel].view(region.size)
            yield placed.key, placed.shape, where, part


def whole_gradients(engine: "Engine") -> dict[str, torch.Tensor]:
    """Gradients by name, of one process."""
    gradients: dict[str, torch.Tensor] = {}
    for key, shape, where, part in regions(engine):
        gradients.setdefault(key, torch.zeros(shape))[where] = part
    return gradients


def difference(engine: "Engine", reference: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient's element, relative to the largest element of that gradient, over all ranks."""
    worst = 0.0
    for key, _, where, part in regions(engine):
        expected = reference[key]
        # a vocabulary is padded to a multiple of TP
        rows = min(part.shape[0], expected[where].shape[0])
        worst = max(worst, float((part[:rows] - expected[where]).abs().max() / expected.abs().max()))
    return max(engine.groups.gather(worst))


def relative(ours: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, expected, strict=True))


def print_equality(layouts: Sequence[str]) -> None:
    """The table of layouts."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        common = {"kind": "equal", "base": str(write_base(Path(folder)))}
        reference = Path(folder) / "reference.pt"
        alone = launch(1, **common, parallel={}, reference=None)
        torch.save(alone, reference)
        for name in layouts:
            processes, parallel = LAYOUTS[name]
            both = launch(processes, **common, parallel=parallel, reference=str(reference))
            for variant, measured, expected in zip(("targets", "rows"), both, alone, strict=True):
                cells = [f"{measured['gradients']:.1e}"]
                for kind in ("losses", "norms"):
                    keys = [f"{kind}, sharded={x}" for x in (False, True)]
                    cells.append(f"{max(relative(measured[key], expected[keys[0]]) for key in keys):.1e}")
                rows.append((name, variant, *cells))
                print(*rows[-1], file=sys.stderr, flush=True)
    print_table(("layout", "loss by", "gradients", "losses", "gradient norms"), rows)


def write_base(folder: Path) -> Path:
    """A Hugging Face folder with random weights."""
    compat.silence_known_notices()
    cpu.install()
    from dev.bench.engine_case import write_random_base

    sizes: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2}
    return write_random_base(folder, ModelConfig(num_layers=LAYERS, **sizes, vocab_size=512, tied_embeddings=True))


# --- memory, time and bytes


def measure(config: RunConfig, groups: "Groups", job: dict[str, Any]) -> dict[str, float]:
    """Peak bytes, CPU seconds and sent bytes of forward and backward pass of one row; the largest over the ranks."""
    from dev.bench.engine_case import make_documents, make_engine, pack_documents
    from sdlm_megatron.model.attention import key_exchange, varlen

    varlen.QUERY_CHUNK = 16
    sizes: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 2, "num_query_groups": 1}
    config.model = ModelConfig(num_layers=1, **sizes, head_dim=16, vocab_size=512, tied_embeddings=True)
    engine = make_engine(config, groups, job["tokens"])
    documents = make_documents("full", 1, job["tokens"], engine.shape, 4)
    (whole,) = pack_documents(documents, job["tokens"], engine.shape, 4)
    row = engine.prepare(whole)
    sent = {"gather": 0, "reduce": 0}
    gather, reduce, others = dist.all_gather_into_tensor, dist.reduce_scatter_tensor, groups.cp_size - 1

    def counted_gather(output: torch.Tensor, message: torch.Tensor, **options: Any) -> Any:
        sent["gather"] += message.nbytes * others
        return gather(output, message, **options)

    def counted_reduce(output: torch.Tensor, message: torch.Tensor, **options: Any) -> Any:
        sent["reduce"] += output.nbytes * others
        return reduce(output, message, **options)

    exchanged = type("Counted", (), {"all_gather_into_tensor": counted_gather, "reduce_scatter_tensor": counted_reduce})
    key_exchange.dist = exchanged  # type: ignore[assignment]
    kept: dict[int, int] = {}
    known = {x.untyped_storage().data_ptr() for module in engine.modules for x in module.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    started = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        peak = peak_bytes(lambda: engine.forward_backward([row]), groups.device)
    seconds, clean = time.process_time() - started, whole.layout.n_clean
    formula = 2 * clean * engine.heads.kv_heads * engine.heads.dim * 4 * others / groups.cp_size
    worst = [max(x) for x in zip(*groups.gather([sum(kept.values()), peak, seconds, *sent.values()]), strict=True)]
    names = ("kept", "peak", "seconds", "gather", "reduce")
    return dict(zip(names, worst, strict=True)) | {"clean": clean, "formula": formula}


def print_memory(tokens: Sequence[int], ranks: Sequence[int]) -> None:
    """The table of row lengths and numbers of ranks."""
    rows = []
    for length in tokens:
        alone: dict[str, float] = {}
        for size in ranks:
            measured = launch(size, kind="memory", parallel={"context": size}, tokens=length)
            alone = alone or measured
            rows.append(
                (
                    f"{length:,} ({measured['clean']:,} clean)",
                    size,
                    f"{measured['kept'] / 1e6:.1f} ({alone['kept'] / measured['kept']:.2f})",
                    f"{measured['peak'] / 1e6:.1f} ({alone['peak'] / measured['peak']:.2f})",
                    f"{measured['seconds']:.1f} ({alone['seconds'] / measured['seconds']:.2f})",
                    f"{measured['gather'] / 2e6:.3f}",
                    f"{measured['reduce'] / 1e6:.3f}",
                    f"{measured['formula'] / 1e6:.3f}",
                )
            )
            print(*rows[-1], file=sys.stderr, flush=True)
    head = ("row", "N", "kept, MB", "peak, MB", "CPU s of a rank", "one gather, MB", "one reduction, MB", "formula, MB")
    print_table(head, rows)


EXAMPLE = """
python -m dev.bench.context_parallel equal
python -m dev.bench.context_parallel memory --tokens 8192 16384 32768 65536 --ranks 1 2 4 8
"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m dev.bench.context_parallel", __doc__, example=EXAMPLE)
    parser.add_argument("what", choices=("equal", "memory", "rank"), help="table; `rank` is a process of it")
    parser.add_argument("job", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of `equal`")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="row lengths")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks N, from 1")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if args.what == "rank":
        run_rank(json.loads(args.job))
    elif args.what == "equal":
        print_equality(args.layouts)
    else:
        print_memory(args.tokens, args.ranks)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
