"""Import and export of a wide model, against `cp` of the same bytes; and both killed half-way and run again.

The model has the width of Qwen2.5-32B and random bf16 weights. Every step starts with the page cache empty of its input
(dropped file by file) and ends with its output on the disk. Memory is the largest sum, over all processes of a command,
of the pages that belong to no file.
"""

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.compare import differences, open_any
from checkpoints_tools.export_folder import write_hf_folder
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.files import fsync_tree
from sdlm_megatron.weights.hf_config import HFConfig
from sdlm_megatron.weights.names import checkpoint_rows


def wide(layers: int, narrow: int = 1) -> HFConfig:
    """Shape of Qwen2.5-32B with fewer layers; `narrow` divides its widths, for a trial of the program itself."""
    shape = ModelConfig(
        num_layers=layers,
        hidden_size=5120 // narrow,
        ffn_hidden_size=27648 // narrow,
        num_attention_heads=40 // narrow,
        num_query_groups=8 // narrow,
        head_dim=128,
        vocab_size=152064 // narrow,
    )
    return HFConfig("qwen2", shape, "bfloat16", eos_token_ids=(151645,))


class RandomTensors:
    """Random bf16 weights that are never all in memory: each row is the same whenever it is read."""

    def __init__(self, config: HFConfig) -> None:
        shape = config.shape
        self._columns = {"o_proj": shape.num_attention_heads * shape.head_dim, "down_proj": shape.ffn_hidden_size}
        self._hidden = shape.hidden_size
        self._rows = {name: sum(b - a for _, a, b in parts) for name, parts in checkpoint_rows(shape).items()}
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(1 << 24, generator=generator).to(torch.bfloat16)

    def names(self) -> list[str]:
        return list(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        if name.endswith((".bias", "norm.weight")):
            return (self._rows[name],)
        return (self._rows[name], self._columns.get(name.split(".")[-2], self._hidden))

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        shape = torch.Size(size)
        first = (self.names().index(name) * 7919 + start[0] * 104729) % (len(self._noise) // 2)
        found = self._noise[first:]
        return found.repeat(shape.numel() // len(found) + 1)[: shape.numel()].view(shape)

    def identity(self) -> dict[str, Any]:
        return {"random": 0}


def drop_cache(folder: Path) -> None:
    """Removes a folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def anonymous_memory(pid: int) -> int:
    """Bytes of a process and its children that belong to no file; 0 when it is gone."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous_memory(int(child)) for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def run(module: str, *arguments: str, until: Callable[[], bool] = lambda: False) -> tuple[float, int]:
    """Runs `python -m module`; returns its seconds and peak anonymous memory. SIGKILL as soon as `until` says so."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", module, *arguments])
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        if until():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{module} failed with {process.returncode}")
    return time.perf_counter() - started, peak


def cpu_seconds() -> float:
    """Of all ended child processes, user and system."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r` and of bringing the copy to the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    fsync_tree(target)
    return time.perf_counter() - started


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def step(name: str, module: str, source: Path, target: Path, options: Sequence[str]) -> None:
    """Measures a command against cp of its input, then kills it when half is written, and runs it again."""
    flag = "--hf" if module.endswith("hf_to_mcore") else "--ckpt"
    command = (module, flag, str(source), "--out", str(target), *options)
    beside = target.with_name("copy")
    drop_cache(source)
    before = cpu_seconds()
    seconds = copy(source, beside)
    shutil.rmtree(beside)
    written = size(source)
    report(f"cp -r + fsync ({name})", written, seconds, f"{cpu_seconds() - before:.1f} s of CPU")
    before = cpu_seconds()
    drop_cache(source)
    seconds, peak = run(*command)
    used = cpu_seconds() - before
    report(name, written, seconds, f"{used:.1f} s of CPU, anonymous memory {peak / 1e6:.0f} MB")
    whole = open_any(target)
    if found := differences(open_any(source), whole):
        raise SystemExit(f"{name}: {len(found)} tensors differ: {found[0]}")
    print(f"{name}: every tensor equal to the input's", flush=True)
    kept = target.rename(target.with_name("uninterrupted"))
    partial = target.with_name(target.name + ".partial")
    half = written // 2
    seconds, _ = run(*command, until=lambda: partial.is_dir() and size(partial) > half)
    done = len(list((partial / "done").iterdir()))
    again, _ = run(*command)
    same = subprocess.run(["diff", "-rq", str(kept), str(target)], check=False).returncode == 0
    print(f"{name}: killed after {seconds:.1f} s with {done} files whole, again {again:.1f} s: byte-equal {same}")
    shutil.rmtree(kept)
    if not same:
        raise SystemExit(1)


def report(name: str, count: int, seconds: float, rest: str = "") -> None:
    print(f"{name:28s} {count / 1e9:.2f} GB  {seconds:.1f} s  {count / 1e6 / seconds:.0f} MB/s  {rest}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.convert", __doc__, example="python -m dev.bench.convert --layers 4 --work /data/trial"
    )
    parser.add_argument("--layers", type=int, default=4, help="about 1 GB each, and 3.1 GB beside them")
    parser.add_argument("--narrow", type=int, default=1, choices=(1, 8), help="divides all widths, for a quick trial")
    parser.add_argument("--shard-gb", default="1", help="size limit of the exported weight files")
    parser.add_argument("--work", type=Path, required=True, help="folder to work in: room for four copies; removed")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if args.work.exists():
        raise ConfigError(
            "the folder to work in exists already", str(args.work), "name a new one: it is removed at the end"
        )
    args.work.mkdir(parents=True)
    try:
        base, checkpoint, out = (args.work / name for name in ("base", "checkpoint", "export"))
        config = wide(args.layers, args.narrow)
        write_hf_folder(base, RandomTensors(config), config)
        print(f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores", flush=True)
        step("import", "checkpoints_tools.hf_to_mcore", base, checkpoint, [])
        shutil.rmtree(base)
        step("export", "checkpoints_tools.mcore_to_hf", checkpoint, out, ["--max-shard-gb", args.shard_gb])
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
