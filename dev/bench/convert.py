"""Import and export of a wide model, compared with `cp` of the same bytes; both are also killed half-way and resumed.

The model has the width of Qwen2.5-32B and random bf16 weights. Each command starts with its input dropped from the page
cache and ends with its output on the disk. Memory is the peak of anonymous pages, summed over a command's processes.
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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints_tools.compare import differences, open_any
from dev.bench.timing import print_table
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.files import fsync_tree, write_json


def write_random_base(folder: Path, layers: int, narrow: int) -> None:
    """Writes a bf16 model in the shape of Qwen2.5-32B with fewer layers and its widths divided by `narrow`."""
    config = Qwen2Config(
        vocab_size=152064 // narrow,
        hidden_size=5120 // narrow,
        intermediate_size=27648 // narrow,
        num_hidden_layers=layers,
        num_attention_heads=40 // narrow,
        num_key_value_heads=8 // narrow,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    # One file per tensor, so that the model is never in memory as a whole.
    files = {name: f"model-{i:05}.safetensors" for i, name in enumerate(shapes)}
    for name, shape in shapes.items():
        save_file({name: torch.randn(shape, dtype=torch.bfloat16)}, folder / files[name], metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    fsync_tree(folder)  # pages that are not on the disk yet cannot be dropped from the cache


def drop_cache(folder: Path) -> None:
    """Removes a folder's files from the page cache."""
    for file in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def anonymous_memory(pid: int) -> int:
    """Bytes in anonymous pages of a process and its children; 0 once it has exited."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous_memory(int(child)) for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass  # a process that exits while it is read counts as 0
    return total


@dataclass(frozen=True)
class CommandCost:
    """Cost of one command."""

    seconds: float
    cpu: float
    """User and system seconds of all its processes."""
    memory: int = 0
    """Peak anonymous memory, bytes."""


def run_measured(command: Sequence[str], until: Callable[[], bool] = lambda: False) -> CommandCost:
    """Runs a command to its end, or kills it with SIGKILL as soon as `until` returns true."""
    started, before, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        # SIGKILL cannot be handled, like a lost node.
        if until():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return CommandCost(time.perf_counter() - started, cpu, peak)


def copy(source: Path, target: Path) -> CommandCost:
    """Copies a folder with `cp -r`, waits until it is on the disk, and removes it."""
    started = time.perf_counter()
    cost = run_measured(["cp", "-r", str(source), str(target)])
    # cp returns when the data is in the page cache; the conversions end with their output on the disk.
    fsync_tree(target)
    cost = replace(cost, seconds=time.perf_counter() - started)
    shutil.rmtree(target)
    return cost


def measure_conversion(name: str, module: str, source: Path, target: Path, options: Sequence[str]) -> None:
    """Compares a command with cp of its input, checks its output, then kills it half-way and resumes it.

    Raises:
        SystemExit: tensors differ from the input's, or the resumed output differs from the uninterrupted one.
    """
    flag = "--hf" if module.endswith("hf_to_mcore") else "--ckpt"
    command = [sys.executable, "-m", module, flag, str(source), "--out", str(target), *options]
    written = size(source)
    drop_cache(source)
    copied = copy(source, target.with_name("copy"))
    drop_cache(source)
    cost = run_measured(command)
    rows = []
    for text, c in (("cp -r and fsync", copied), (name, cost)):
        figures = (c.seconds, written / 1e6 / c.seconds, c.cpu, c.memory / 1e6)
        rows.append((text, f"{written / 1e9:.2f}", *map("{:.1f}".format, figures)))
    print_table(("", "GB", "seconds", "MB/s", "CPU seconds", "anonymous memory, MB"), rows)
    if different := differences(open_any(source), open_any(target)):
        raise SystemExit(f"{name}: {len(different)} tensors differ: {different[0]}")
    print(f"{name}: every tensor equal to the input's", flush=True)
    uninterrupted = target.rename(target.with_name("uninterrupted"))
    partial = target.with_name(target.name + ".partial")
    killed = run_measured(command, until=lambda: partial.is_dir() and size(partial) > written // 2)
    done = len(list((partial / "done").iterdir()))
    resumed = run_measured(command)
    same = subprocess.run(["diff", "-rq", str(uninterrupted), str(target)], check=False).returncode == 0
    print(
        f"{name}: killed after {killed.seconds:.1f} s with {done} complete files, resumed for {resumed.seconds:.1f} s: "
        f"byte-equal {same}\n"
    )
    shutil.rmtree(uninterrupted)
    if not same:
        raise SystemExit(1)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.bench.convert"
    parser = make_parser(command, __doc__, example=f"{command} --layers 4 --work /data/trial")
    parser.add_argument("--layers", type=int, default=4, help="layers of about 1 GB each, in addition to 3.1 GB")
    parser.add_argument(
        "--narrow", type=int, default=1, choices=(1, 8), help="divisor of all widths, for a quick trial"
    )
    parser.add_argument("--shard-gb", default="1", help="size limit of the exported weight files")
    parser.add_argument("--work", type=Path, required=True, help="new folder with room for four copies; it is removed")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if args.work.exists():
        raise ConfigError("the work folder exists", str(args.work), "name a new one: it is removed at the end")
    args.work.mkdir(parents=True)
    try:
        base, checkpoint, out = (args.work / name for name in ("base", "checkpoint", "export"))
        write_random_base(base, args.layers, args.narrow)
        print(f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores", flush=True)
        measure_conversion("import", "checkpoints_tools.hf_to_mcore", base, checkpoint, [])
        shutil.rmtree(base)
        export = "checkpoints_tools.mcore_to_hf"
        measure_conversion("export", export, checkpoint, out, ["--max-shard-gb", args.shard_gb])
    finally:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
