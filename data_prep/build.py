"""Builds a packed dataset: `python -m data_prep.build --config FILE [--a.b=c]`.

    tokenize   every unit of input rows -> documents on disk             (documents.py; any process, any machine)
    pack       numbers, duplicates, order, best-fit packing of each epoch (planning.py; one process)
    write      every part of an epoch: draw the blocks, write the rows    (rows.py; any process)

All of it happens in OUT.partial, which is renamed to OUT at the end. What is done stays done: after a kill the same
command goes on. The result depends on the config and the input alone, not on who did which unit or part.
"""

import argparse
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.accounting import account, write_rejects
from data_prep.build_config import PRESETS, BuildConfig, SourceConfig, check
from data_prep.build_report import dry_run, report
from data_prep.chat import frame_of
from data_prep.documents import UnitResult, load_result, tokenize_unit
from data_prep.encoders import BulkEncoder, TextTokenizer, TokenizerMismatch, open_encoder
from data_prep.planning import Plan, make_plan
from data_prep.pool import cpus, work_on
from data_prep.readers import LINES, Unit, plan
from data_prep.rows import Part, RowWriter, cut_parts, load_part
from data_prep.sources import expand
from sdlm_megatron.config.command_line import make_config_parser, parse_config
from sdlm_megatron.data.chatml import IM_END
from sdlm_megatron.data.format import PartInfo, seal
from sdlm_megatron.data.tokenizer_identity import fingerprint, special_token_id, vocabulary_size
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.files import write_json, write_text
from sdlm_megatron.progress import track

ROW_BYTES = 2500
"""Bytes of a line, about: rows of a file of lines are not counted before they are read."""


@dataclass(frozen=True)
class Shard:
    """Share `number` of `count` of the tokenizing, for a job of many machines."""

    number: int
    count: int


def build(config: BuildConfig, console: Console | None = None, *, workers: int = 1) -> dict[str, Any]:
    """Builds the dataset of `config`, or what is left of it to build, and returns its manifest.

    Args:
        config: settings.
        console: where progress goes.
        workers: processes; they change nothing but the time it takes.

    Raises:
        ConfigError, DataError: a setting, a source or the tokenizer cannot be used, or nothing is left to
        train on.
    """
    console = console or Console()
    check(config)
    return _built(config, console) or _complete(_begin(config), console, workers)


def build_shard(config: BuildConfig, shard: Shard, console: Console | None = None, *, workers: int = 1) -> None:
    """Tokenizes one share of the units; `merge` makes the dataset once all shares are done. Arguments as for
    `build`."""
    console = console or Console()
    check(config)
    if _built(config, console):
        return
    job = _begin(config)
    mine = range(shard.number, len(job.units), shard.count)
    _tokenize(job, mine, console, workers)
    console.print(f"shard {shard.number}/{shard.count} is done: {len(mine)} of {len(job.units)} units", highlight=False)


def merge(config: BuildConfig, console: Console | None = None, *, workers: int = 1) -> dict[str, Any]:
    """Makes the dataset from the work of all shards; DataError when some of it is missing. Arguments as for
    `build`."""
    console = console or Console()
    check(config)
    if manifest := _built(config, console):
        return manifest
    job = _begin(config)
    if missing := [i for i in range(len(job.units)) if job.result(i) is None]:
        raise DataError(
            f"{len(missing)} of {len(job.units)} units are not tokenized, the first is {missing[0]}",
            str(job.work),
            f"run the shards first; of N shards, number {missing[0]} modulo N has not finished",
        )
    return _complete(job, console, workers)


@dataclass(frozen=True)
class _Job:
    """A build that has begun; the same in every process that works at it."""

    config: BuildConfig
    sources: list[SourceConfig]
    units: list[Unit]
    meta: dict[str, Any]
    partial: Path

    @property
    def work(self) -> Path:
        return self.partial / "work"

    @property
    def distrust(self) -> Path:
        """File that is there once the fast encoder was found to be wrong; it says how."""
        return self.work / "distrust.txt"

    def result(self, number: int) -> UnitResult | None:
        """What became of a unit; None while that is not known, or not to be trusted."""
        result = load_result(self.work, number)
        doubtful = result is not None and result.encoder.startswith("fastokens") and self.distrust.exists()
        return None if doubtful else result


def _complete(job: _Job, console: Console, workers: int) -> dict[str, Any]:
    """Does what is left of a build."""
    with _locked(job.work):
        _tokenize(job, range(len(job.units)), console, workers)
        manifest = _finish(job, console, workers)
    report(manifest, job.config, console)
    return manifest


def _built(config: BuildConfig, console: Console) -> dict[str, Any] | None:
    """The manifest of `config.out` if this very build made it; None if there is nothing yet."""
    out = Path(config.out)
    if not out.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
        same = manifest["build"] == _settings(config)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError("the dataset folder exists already", config.out, "name another folder, or remove it")
    shutil.rmtree(out / "work", ignore_errors=True)  # killed between the last two steps
    console.print(f"{config.out} is built already, with these settings", highlight=False)
    return manifest


def _settings(config: BuildConfig) -> dict[str, Any]:
    """The settings that make the dataset what it is: all but its name."""
    return {key: value for key, value in asdict(config).items() if key != "out"}


def _begin(config: BuildConfig) -> _Job:
    """Looks at tokenizer and sources, and opens the work folder; one that was begun otherwise is refused."""
    meta = _meta(config)
    sources = expand(config.sources)
    units = plan(sources)
    out = Path(config.out)
    meta["sources"] = [asdict(source) for source in sources]
    job = _Job(config, sources, units, meta, out.with_name(out.name + ".partial"))
    settings = {"config": _settings(config), "tokenizer": meta["tokenizer"], "units": [asdict(unit) for unit in units]}
    settings = json.loads(json.dumps(settings))
    file = job.work / "build.json"
    if not file.exists():
        job.work.mkdir(parents=True, exist_ok=True)
        own = job.work / f"build-{os.uname().nodename}-{os.getpid()}.json"  # other shards may be doing the same
        write_json(own, settings)
        os.replace(own, file)
    begun = json.loads(file.read_text())
    for key, found in settings.items():
        if begun[key] == found:
            continue
        names = [k for k in found if begun[key].get(k) != found[k]] if isinstance(found, dict) else ["the input files"]
        raise ConfigError(
            f"this build was begun with other settings: {', '.join(names)}",
            str(job.partial),
            "give the same settings to go on, or remove the folder to begin anew",
        )
    return job


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keeps a second process from finishing the same build."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError("another process is at this build", str(work.parent), "wait for it, or stop it") from None
        yield


def _meta(config: BuildConfig) -> dict[str, Any]:
    """Manifest fields that follow from settings and tokenizer; DataError when the tokenizer cannot be used."""
    sizes = ("row_length", "max_document_length", "block_size", "repeat", "target_shift")
    kept = (*sizes, "seed", "overlong", "trim", "system_prompt")
    folder = config.tokenizer
    mask, size = special_token_id(folder, config.mask_token), vocabulary_size(folder)
    known = {token: special_token_id(folder, token) for token in (IM_END, config.pad_token)}
    for token, found in known.items():
        if found >= size:
            fix = "set pad_token to a token it has" if token == config.pad_token else "use a ChatML tokenizer"
            raise DataError(f"the tokenizer has no `{token}`", folder, fix)
    return {
        **{key: getattr(config, key) for key in kept},
        "mask_token": config.mask_token,
        "mask_token_id": mask,
        "eos_token_id": known[IM_END],
        "pad_token_id": known[config.pad_token],
        "vocab_size": max(size, mask + 1),
        "tokenizer": {"fingerprint": fingerprint(folder), "name": Path(folder).name},
    }


@lru_cache(maxsize=1)
def _encoder(folder: str, mask_token: str) -> BulkEncoder:
    """The encoder of this process: opening one takes seconds."""
    return open_encoder(folder, mask_token)


@lru_cache(maxsize=1)
def _slow_encoder(folder: str, mask_token: str) -> BulkEncoder:
    encoder = TextTokenizer.from_folder(folder, mask_token)
    encoder.reason = "the fast one gave other ids"
    return encoder


class _Tokenizing:
    """Worker of stage one: unit number -> its result; or None when the fast encoder was found to be wrong."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._encoder = _encoder(job.config.tokenizer, job.config.mask_token)

    def __call__(self, number: int) -> UnitResult | None:
        unit, job = self._job.units[number], self._job
        if job.distrust.exists():
            self._encoder = _slow_encoder(job.config.tokenizer, job.config.mask_token)
        try:
            return tokenize_unit(job.config, job.sources[unit.source], unit, number, self._encoder, job.work)
        except TokenizerMismatch as error:
            write_text(job.distrust, str(error))
            return None


def _tokenize(job: _Job, numbers: Sequence[int], console: Console, workers: int) -> None:
    """Stage one for some units; those that are done are not done again.

    A fast encoder that gives one wrong id is not trusted with any: what it did is done again without it.
    """
    todo = [number for number in numbers if job.result(number) is None]
    if len(todo) < len(numbers):
        console.print(f"{len(numbers) - len(todo)} of {len(numbers)} units are tokenized already", highlight=False)
    if not todo:
        return
    encoders: set[str] = set()
    with track("tokenize", sum(_rows(job.units[i]) for i in todo), "rows", console) as advance:
        for number, result in work_on(todo, _Tokenizing, (job,), workers):
            if result is not None:
                if result.encoder not in encoders:
                    console.print(f"tokenizer: {result.encoder}", highlight=False)
                    encoders.add(result.encoder)
                advance(result.rows, result.tokens, _rows(job.units[number]))
    if any(job.result(number) is None for number in todo):
        console.print(
            f"the fast tokenizer gave other ids: {job.distrust.read_text()}\nwhat it did is tokenized again without it",
            highlight=False,
        )
        _tokenize(job, numbers, console, workers)


def _rows(unit: Unit) -> int:
    """Rows of a unit; of lines an estimate."""
    size = unit.stop - unit.start
    return max(1, size // ROW_BYTES) if unit.kind == LINES else size


class _Writing:
    """Worker of stage three: part -> what it holds."""

    def __init__(self, job: _Job, plan: Plan) -> None:
        self._writer = RowWriter(job.config, job.sources, plan, job.partial, job.meta)

    def __call__(self, part: Part) -> PartInfo:
        return self._writer.write(part)


def _finish(job: _Job, console: Console, workers: int) -> dict[str, Any]:
    """Stages two and three, and the manifest."""
    results = [result for i in range(len(job.units)) if (result := job.result(i)) is not None]
    weights = [job.sources[unit.source].weight for unit in job.units]
    n_documents = sum(result.documents * weight for result, weight in zip(results, weights, strict=True))
    with track("pack", n_documents * job.config.epochs, "documents", console) as advance:
        found = make_plan(job.config, job.sources, job.units, results, job.work, advance)
    parts = cut_parts(job.config, found)
    if not all(found.rows):
        shutil.rmtree(job.partial)
        raise DataError("no row to write: every document was dropped or rejected", job.config.out)
    done = {part: info for part in parts if (info := load_part(job.work, job.partial, part))}
    with track("write", sum(found.rows), "rows", console) as advance:
        advance(sum(part.stop - part.start for part in done))
        todo = [part for part in parts if part not in done]
        for part, info in work_on(todo, _Writing, (job, found), workers):
            done[part] = info
            advance(info.counts.rows, info.counts.clean + info.counts.block)
    return _seal(job, found, results, [done[part] for part in parts], parts)


def _seal(
    job: _Job, found: Plan, results: list[UnitResult], infos: list[PartInfo], parts: list[Part]
) -> dict[str, Any]:
    """Accounting, rejects, manifest; the dataset gets its name, and the work folder goes."""
    dropped = job.config.duplicates == "drop"
    common = (job.work, job.sources, job.units, results, found.numbering)
    accounting = account(*common, dropped_duplicates=dropped)
    rejects = job.partial / "rejects.jsonl"
    write_rejects(rejects, *common, dropped_duplicates=dropped)
    with open(rejects, "rb") as file:
        digest = {"bytes": rejects.stat().st_size, "sha256": file_digest(file, "sha256").hexdigest()}
    frame = frame_of(_encoder(job.config.tokenizer, job.config.mask_token))
    wanted = {"work", "rejects.jsonl", *(name for info in infos for name in info.files)}
    for leftover in job.partial.iterdir():
        if leftover.name not in wanted:
            leftover.unlink()
    manifest = seal(
        job.partial,
        Path(job.config.out),
        meta=job.meta,
        parts=[[i for i, p in zip(infos, parts, strict=True) if p.epoch == e] for e in range(job.config.epochs)],
        files={"rejects.jsonl": digest},
        extra={
            "accounting": accounting,
            "duplicates": {"policy": job.config.duplicates, "documents": found.duplicates, "pairs": found.pairs},
            "chat": asdict(frame),
            "blocks_trimmed": found.blocks_trimmed,
            "build": _settings(job.config),
        },
    )
    shutil.rmtree(Path(job.config.out) / "work")
    return manifest


def _shard(text: str) -> Shard:
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/8") from None
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"shard {number} of {count}: give 0/{count} to {count - 1}/{count}")
    return Shard(number, count)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_config_parser(
        "sdlm prepare",
        "Conversations -> packed dataset for `sdlm train`.",
        example="sdlm prepare --config data.yaml --out=data/mine --block_size=8",
        schema=BuildConfig,
        presets=PRESETS,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be read, written and needed; build nothing"
    )
    parser.add_argument("--workers", type=int, default=cpus(), metavar="N", help="processes (all CPUs: %(default)s)")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="tokenize share I of N only, for many machines that see one OUT; then --merge",
    )
    parser.add_argument("--merge", action="store_true", help="make the dataset from the work of all shards")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config, args = parse_config(build_parser(), BuildConfig, PRESETS, argv)
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}", "--workers", "give 1 or more")
    try:
        if args.dry_run:
            dry_run(config, Console())
        elif args.shard:
            build_shard(config, args.shard, workers=args.workers)
        else:
            (merge if args.merge else build)(config, workers=args.workers)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fix = "make room (--dry-run says how much is needed); the same command goes on from here"
        raise DataError("the disk is full", config.out, fix) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
