"""Build a packed dataset from conversations.

    tokenize   each unit of input rows -> documents on disk               (any process, any machine)
    pack       numbering, duplicates, order, best-fit packing per epoch   (one process)
    write      each part of an epoch: draw the blocks, write the rows     (any process)

All work happens in OUT.partial, which is renamed to OUT at the end. Completed work is kept: after an interruption the
same command resumes. The result depends only on the settings and the input, not on the number of processes or shards.
"""

import argparse
import errno
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.accounting import Accounting
from data_prep.build_config import PRESETS, BuildConfig, SourceConfig, check, lasting
from data_prep.build_report import dry_run, expected_rows, report, template_lines, unread_lines
from data_prep.build_state import (
    BuildState,
    discard,
    evaluation_digest,
    input_digests,
    locked,
    open_work,
    weights_by_name,
)
from data_prep.chat import frame_of
from data_prep.decontaminate import evaluation_files
from data_prep.documents import UnitResult, tokenize_unit
from data_prep.encoders import TextTokenizer, TokenizerMismatch, open_encoder
from data_prep.encoding import TextEncoder
from data_prep.first_rows import check_fields, check_results, with_formats
from data_prep.inst_template import check_system
from data_prep.outcomes import refusal
from data_prep.planning import PackingPlan, dropped_files, make_plan, number_sources
from data_prep.pool import cpus, ending_on_interrupt, work_on
from data_prep.preview import show_samples, take_samples
from data_prep.readers import plan_units
from data_prep.repetitions import repetition_entries
from data_prep.row_rules import UNTRAINED_FILE
from data_prep.rows import EpochPart, RowWriter, cut_parts, load_part
from data_prep.source_formats import FORMATS, formats_help
from data_prep.sources import expand, input_sources
from sdlm_megatron.config.command_line import add_preset, make_parser, parse_with_settings
from sdlm_megatron.config.load import load_config, to_yaml
from sdlm_megatron.config.secret_text import mask_values
from sdlm_megatron.data.chatml import format_of
from sdlm_megatron.data.format import PartInfo, seal
from sdlm_megatron.data.tokenizer_identity import fingerprint, same_tokenizer, special_token_id, vocabulary_size
from sdlm_megatron.errors import ConfigError, DataError, UnfitError, UserError, make_console, run_cli
from sdlm_megatron.files import make_folder, sha256, write_json, write_text
from sdlm_megatron.progress import track


@dataclass(frozen=True)
class TokenizeShard:
    """Share `number` of `count` of the tokenizing work, for a job on several machines."""

    number: int
    count: int


def build(
    config: BuildConfig, console: Console | None = None, *, workers: int = 1, examples: bool = False
) -> dict[str, Any]:
    """Builds a dataset, or completes an interrupted build, and returns its manifest. The number of `workers` does not
    affect the result; with `examples`, the first rows are shown before the work starts.

    Raises:
        ConfigError: a setting is invalid, or an interrupted build used other settings.
        DataError: a source or the tokenizer cannot be used, no row remains, or too many are rejected.
    """
    console = console or make_console()
    check(config)
    if manifest := _existing_manifest(config, console):
        return manifest
    state = _begin(config, restart=True)
    try:
        if examples:
            encoder = _encoder(config.tokenizer, config.mask_token)
            samples = take_samples(config, state.sources, state.units, encoder, state.mismatch)
            show_samples(config, samples, console)
        return _complete(state, console, workers)
    except UnfitError:
        write_json(state.refused, {})
        raise


def build_shard(config: BuildConfig, shard: TokenizeShard, console: Console | None = None, *, workers: int = 1) -> None:
    """Tokenizes one share of the units; `merge` completes the dataset once all shards are done. Arguments and errors
    as for `build`."""
    console = console or make_console()
    check(config)
    if _existing_manifest(config, console):
        return
    state = _begin(config)
    numbers = range(shard.number, len(state.units), shard.count)
    _tokenize(state, numbers, console, workers)
    console.print(f"shard {shard.number}/{shard.count} is done: {len(numbers)} of {len(state.units)} units")


def merge(config: BuildConfig, console: Console | None = None, *, workers: int = 1) -> dict[str, Any]:
    """Completes the dataset from the work of all shards. Arguments and errors as for `build`; also DataError if the
    work of a shard is missing."""
    console = console or make_console()
    check(config)
    if manifest := _existing_manifest(config, console):
        return manifest
    state = _begin(config)
    if missing := [i for i in range(len(state.units)) if state.result(i) is None]:
        raise DataError(
            f"{len(missing)} of {len(state.units)} units are not tokenized; the first is {missing[0]}",
            str(state.work),
            f"run the missing shards first; of N shards, number {missing[0]} modulo N is incomplete",
        )
    return _complete(state, console, workers)


def _complete(state: BuildState, console: Console, workers: int) -> dict[str, Any]:
    """Performs all remaining stages."""
    # Shards need no lock, because they write distinct units; packing and sealing happen in one process only.
    try:
        with locked(state.work):
            _tokenize(state, range(len(state.units)), console, workers)
            manifest = _finish(state, console, workers)
        shutil.rmtree(Path(state.config.out) / "work")  # the lock is closed: see `discard`
    finally:
        shutil.rmtree(state.discarded, ignore_errors=True)
    report(manifest, state.config, console)
    return manifest


def _existing_manifest(config: BuildConfig, console: Console) -> dict[str, Any] | None:
    """Manifest of `config.out` if it was built with these settings from this input; None if the folder does not
    exist."""
    out = Path(config.out)
    if not out.exists():
        return None
    manifest = _read_manifest(config.out)
    try:
        same = lasting(manifest["build"]) == lasting(_settings(config))
    except (KeyError, TypeError):
        same = False
    if not same:
        raise DataError("the output folder already exists", config.out, "set another --out, or remove the folder")
    shutil.rmtree(out / "work", ignore_errors=True)  # remains if a build was killed right after the rename
    console.print(f"{config.out} already exists, built with these settings{_input_compared(config, manifest)}")
    return manifest


def _read_manifest(out: str) -> dict[str, Any]:
    """Manifest of a finished dataset; {} where there is none."""
    try:
        manifest = json.loads(Path(out, "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _input_compared(config: BuildConfig, manifest: dict[str, Any]) -> str:
    """End of a sentence about the input of a finished dataset. Raises DataError if it is another one by now."""
    if not isinstance(former := manifest.get("input"), dict):  # a dataset of an older version
        return ""
    changed = ["the tokenizer"] * (same_tokenizer(config.tokenizer, manifest) is False)
    former, missing = former | weights_by_name(manifest["sources"]), []

    def of_source(source: SourceConfig) -> dict[str, Any]:
        own = expand([source])
        digests = input_digests([source.name] * len(own), plan_units(own))
        return digests | weights_by_name(mask_values([asdict(part) for part in own]))

    def compare(digests: Callable[[], dict[str, Any]]) -> None:
        try:
            changed.extend(name for name, digest in digests().items() if former.get(name) != digest)
        except UserError as error:  # often removed once the dataset is there
            missing.append(f"{error.where}: {error.what}")

    for source in config.sources:
        compare(partial(of_source, source))
    compare(lambda: evaluation_digest(evaluation_files(config.decontaminate)))
    if changed:
        fix = "set another --out, or remove the folder to build it again"
        what = f"the output folder was built from other input; different now: {', '.join(changed)}"
        raise DataError(what, config.out, fix)
    return f"; not all of its input is compared: {'; '.join(missing)}" if missing else " from this input"


def _settings(config: BuildConfig) -> dict[str, Any]:
    """Settings that determine the content of the dataset: all but its name; secrets, as in an address, are masked."""
    return mask_values({key: value for key, value in asdict(config).items() if key != "out"})


def _begin(config: BuildConfig, *, restart: bool = False) -> BuildState:
    """Checks tokenizer and sources and opens the work folder as `open_work` does."""
    make_folder(Path(config.out).absolute().parent, dry=True)
    meta = _meta(config)
    expanded = {source.name: expand([source]) for source in config.sources}
    sources = with_formats([part for parts in expanded.values() for part in parts])
    units = plan_units(sources)
    check_fields(sources, units, config.system_prompt)
    meta["sources"] = [mask_values(asdict(source)) for source in sources]
    settings: dict[str, Any] = {"config": lasting(_settings(config)), "tokenizer": meta["tokenizer"]}
    settings["weights"] = weights_by_name(meta["sources"])
    settings |= {"units": [asdict(unit) for unit in units], "evaluation": evaluation_files(config.decontaminate)}
    names = [name for name, parts in expanded.items() for _ in parts]
    meta["input"] = input_digests(names, units) | evaluation_digest(settings["evaluation"])
    state = BuildState(config, sources, units, meta, Path(f"{Path(config.out)}.partial"))
    return open_work(state, settings, restart=restart)


def _meta(config: BuildConfig) -> dict[str, Any]:
    """Manifest fields that follow from settings and tokenizer; raises DataError if the tokenizer cannot be used."""
    sizes = ("row_length", "max_document_length", "block_size", "repeat", "target_shift")
    copied = (*sizes, "seed", "overlong", "trim", "system_prompt")
    folder = config.tokenizer
    mask, size = special_token_id(folder, config.mask_token), vocabulary_size(folder)
    chat = format_of(lambda token: special_token_id(folder, token) < size)
    check_system(chat, config.system_prompt)
    ids = {token: special_token_id(folder, token) for token in (chat.end, config.pad_token)}
    for token, token_id in ids.items():
        if token_id >= size:  # special_token_id returns the first free id for a token the tokenizer lacks
            other = "use a tokenizer with the tokens of ChatML, Llama 3's headers or [INST]"
            fix = "set pad_token to one of its tokens" if token == config.pad_token else other
            raise DataError(f"the tokenizer has no `{token}`", folder, fix)
    return {
        **{key: getattr(config, key) for key in copied},
        "mask_token": config.mask_token,
        "mask_token_id": mask,
        "eos_token_id": ids[chat.end],
        "pad_token_id": ids[config.pad_token],
        "vocab_size": max(size, mask + 1),  # the mask token may extend the vocabulary of the base
        "tokenizer": {"fingerprint": fingerprint(folder, config.mask_token), "name": Path(folder).name},
    }


@lru_cache(maxsize=2)
def _encoder(folder: str, mask_token: str, fast: bool = True) -> TextEncoder:
    """Encoder of this process; opening one takes seconds."""
    if fast:
        return open_encoder(folder, mask_token)
    encoder = TextTokenizer.from_folder(folder, mask_token)
    encoder.reason = "fastokens returned other ids"
    return encoder


class _TokenizeWorker:
    """Worker of stage one: unit number -> its result, or None if the fast encoder returned wrong ids."""

    def __init__(self, state: BuildState) -> None:
        self._state = state
        self._encoder = _encoder(state.config.tokenizer, state.config.mask_token)

    def __call__(self, number: int) -> UnitResult | None:
        state = self._state
        unit = state.units[number]
        source = state.sources[unit.source]
        if state.mismatch.exists():  # another process may have detected the mismatch
            self._encoder = _encoder(state.config.tokenizer, state.config.mask_token, fast=False)
        try:
            return tokenize_unit(state.config, source, unit, number, self._encoder, state.work, state.begun)
        except TokenizerMismatch as error:
            write_text(state.mismatch, str(error), shared=True)
            return None


def _tokenize(state: BuildState, numbers: Sequence[int], console: Console, workers: int) -> None:
    """Stage one for some units; skips completed ones.

    After a single wrong id of the fast encoder all its results are discarded and produced again without it, because
    they are verified by sample only.
    """
    todo = [number for number in numbers if state.result(number) is None]
    if len(todo) < len(numbers):
        console.print(f"{len(numbers) - len(todo)} of {len(numbers)} units are already tokenized")
    if not todo:
        return
    encoders: set[str] = set()
    expected = expected_rows(state.sources, state.units, todo)
    with track("tokenize", sum(expected.values()), "rows", console) as advance:
        for number, result in work_on(todo, _TokenizeWorker, (state,), workers):
            if result is not None:
                if result.encoder not in encoders:
                    console.print(f"tokenizer: {result.encoder}")
                    encoders.add(result.encoder)
                advance(result.rows, result.tokens, expected[number])
    if any(state.result(number) is None for number in todo):
        console.print(
            f"fastokens returned other ids than tokenizers {state.mismatch.read_text(encoding='utf-8')}\n"
            "its units are tokenized again without it"
        )
        _tokenize(state, numbers, console, workers)


def _finish(state: BuildState, console: Console, workers: int) -> dict[str, Any]:
    """Stages two and three, and the manifest."""
    results = [result for i in range(len(state.units)) if (result := state.result(i)) is not None]
    _check_rows(state, results)
    plan = make_plan(state.config, state.sources, state.units, results, state.work, console)
    dropped = dropped_files(state.config)
    accounting = Accounting(state.work, state.sources, state.units, results, plan.numbering, dropped)
    if not all(plan.rows):
        _check_rows(state, results, packed=False)
    parts = cut_parts(state.config, plan)
    # Parts of an earlier attempt are complete if their marker exists.
    done = {part: info for part in parts if (info := load_part(state.work, state.partial, part))}
    with track("write", sum(plan.rows), "rows", console) as advance:
        advance(sum(part.stop - part.start for part in done))
        todo = [part for part in parts if part not in done]
        arguments = (state.config, state.sources, plan, state.partial, state.meta)
        for part, info in work_on(todo, RowWriter, arguments, workers):
            done[part] = info
            advance(info.counts.rows, info.counts.clean + info.counts.block)
    return _seal(state, plan, accounting, {part: done[part] for part in parts})


def _check_rows(state: BuildState, results: list[UnitResult], *, packed: bool = True) -> None:
    """Raises DataError, and leaves the rejected rows beside the output, if no row remains (not `packed`: after
    packing) or too many were rejected."""
    numbering = number_sources(state.sources, state.units, results)
    accounting = Accounting(state.work, state.sources, state.units, results, numbering, ())
    rows = [row if packed else row._replace(usable=0) for row in accounting.source_rows()]
    limit = state.config.max_rejected
    error = refusal(rows, lambda: accounting.write_rejects(state.rejects), limit, listed=str(state.rejects))
    unread, lost = check_results(state.sources, state.units, results)
    if not (error := error or lost):
        return
    if any(row.usable for row in rows):  # tokenized units are kept for another max_rejected or ignore
        write_json(state.refused, unread)
    else:
        discard(state)
    raise error


def _seal(
    state: BuildState, plan: PackingPlan, accounting: Accounting, parts: dict[EpochPart, PartInfo]
) -> dict[str, Any]:
    """Writes accounting, rejects and manifest, and renames the dataset."""
    config, rejects = state.config, state.partial / "rejects.jsonl"
    reasons = accounting.write_rejects(rejects)
    others = [rejects]
    if accounting.write_untrained(state.partial / UNTRAINED_FILE):
        others.append(state.partial / UNTRAINED_FILE)
    expected = {"work", *(file.name for file in others), *(name for info in parts.values() for name in info.files)}
    for leftover in state.partial.iterdir():  # temporary files of killed processes
        if leftover.name not in expected:
            leftover.unlink()
    manifest = seal(
        state.partial,
        Path(config.out),
        meta=state.meta,
        parts=[[info for part, info in parts.items() if part.epoch == epoch] for epoch in range(config.epochs)],
        files={file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in others},
        extra={
            "accounting": {**accounting.summarize(), "reasons": mask_values([r._asdict() for r in reasons])},
            "duplicates": {"policy": config.duplicates, "documents": plan.duplicates, "pairs": plan.pairs},
            **repetition_entries(config, plan.near, accounting),
            "chat": frame_of(_encoder(config.tokenizer, config.mask_token)).to_manifest(),
            "blocks_trimmed": plan.blocks_trimmed,
            "build": _settings(config),
        },
    )
    state.rejects.unlink(missing_ok=True)  # of an earlier attempt
    return manifest


def _shard(text: str) -> TokenizeShard:
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/8") from None
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"shard {number} of {count}: use 0/{count} to {count - 1}/{count}")
    return TokenizeShard(number, count)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "sdlm prepare",
        __doc__,
        example="sdlm prepare --input chats.jsonl --tokenizer Qwen2.5-3B --out data/mine\n"
        "sdlm prepare --config mixture_3p5m --tokenizer Qwen2.5-3B --out data/mixture --block_size=8",
        notes=f"Any setting below may follow as --key=value, and one of a source as --sources.NAME.key=value.\n\n"
        f"{formats_help()}",
        settings=BuildConfig,
    )
    parser.list_settings = True
    add_preset(parser, "--config", PRESETS)
    text = "a source: files, folders and globs, or hub:NAME to download a hub dataset; one --input per source"
    parser.add_argument("--input", metavar="PATH", action="append", nargs="+", help=text)
    formats = "source format of --input; default: the one its fields match"
    parser.add_argument("--format", choices=FORMATS, metavar="FORMAT", help=formats)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer of the base model; overrides --config")
    parser.add_argument("--out", metavar="FOLDER", help="dataset folder to create; overrides --config")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="report only, without a build; downloads hub sources")
    parser.add_argument("--workers", type=int, default=cpus(), metavar="N", help="number of processes")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only tokenize share I of N, for several machines that share OUT; complete with --merge",
    )
    parser.add_argument("--merge", action="store_true", help="complete the dataset from the work of all shards")
    return parser


def read_command_line(argv: Sequence[str] | None) -> tuple[BuildConfig, argparse.Namespace]:
    """Settings and options of the command; each `--input` becomes a source of an otherwise default configuration."""
    args, overrides = parse_with_settings(build_parser(), argv)
    if not args.config and not args.input:
        fix = "--input FILE.jsonl, or --config mixture_3p5m"
        raise ConfigError("neither --config nor --input is set", "the command line", fix)
    if args.config and args.input:
        fix = "to add a source to a configuration: sdlm prepare --config NAME --print-config > mine.yaml, append "
        fix += "- {name: mine, format: messages, path: FILE} to its list of sources, then --config mine.yaml"
        raise ConfigError("use either --config or --input", "the command line", fix)
    options = [f"--{key}={getattr(args, key)}" for key in ("tokenizer", "out") if getattr(args, key) is not None]
    if args.input:
        overrides = [f"--sources={json.dumps(input_sources(args.input), ensure_ascii=False)}", *overrides]
    elif args.format:
        raise ConfigError("--format needs --input", "the command line", "set `format` of each source in the config")
    # Later overrides win: --sources comes first, so that --sources.NAME.key can change it.
    config = load_config(BuildConfig, args.config or "", [*overrides, *options], PRESETS)
    for source in config.sources if args.input else ():
        source.format = args.format or source.format or ("" if args.dry_run else _built_format(config, source))
        source.format = source.format or with_formats(expand([source]))[0].format
    return config, args


def _built_format(config: BuildConfig, source: SourceConfig) -> str:
    """Format with which the finished dataset has this source, whose files may be gone by now; "": there is none."""
    sources = _read_manifest(config.out).get("build", {}).get("sources", [])
    return next((entry["format"] for entry in sources if {**entry, "format": ""} == mask_values(asdict(source))), "")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with ending_on_interrupt("interrupted; run the same command again to resume"):
        _run(*read_command_line(argv))


def _run(config: BuildConfig, args: argparse.Namespace) -> None:
    if args.print_config:
        print(to_yaml(config), end="")
        return
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}", "--workers", "use 1 or more")
    for source, paths in zip(config.sources, args.input or (), strict=False):
        print(f"{' '.join(paths)}: source format {source.format} ({FORMATS[source.format].description})")
    finished = Path(config.out, "manifest.json").exists() and not args.dry_run  # its input may be gone
    for line in (*(() if finished else unread_lines(config.sources)), *template_lines(config)):
        print(line)
    try:
        if args.dry_run:
            dry_run(config, make_console(), examples=bool(args.input))
        elif args.shard:
            build_shard(config, args.shard, workers=args.workers)
        elif args.merge:
            merge(config, workers=args.workers)
        else:
            build(config, workers=args.workers, examples=bool(args.input))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fix = "free some space (--dry-run reports the required amount) and run the same command again to resume"
        raise DataError("the disk is full", config.out, fix) from None


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
