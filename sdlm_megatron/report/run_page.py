"""Write one HTML page about a run and all its restarts, whatever state it is in.

The page holds losses, other metrics, speed, goodput, events, samples, the visibility mask and the configuration. It
can be written while the run is in progress.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.load import load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.secret_text import mask_text
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.metrics.formats import format_count, format_duration
from sdlm_megatron.metrics.sinks import METRICS_FILE, SAMPLES_FILE, read_metrics
from sdlm_megatron.ops.attempt import EVENTS_FILE, read_events
from sdlm_megatron.ops.goodput import goodput_of
from sdlm_megatron.ops.run_facts import software
from sdlm_megatron.report import run_sections
from sdlm_megatron.report.evaluation_record import evaluation_sections, load_evaluation, samples_section
from sdlm_megatron.report.page_kit import Page
from sdlm_megatron.report.plots import Records
from sdlm_megatron.report.row_plots import (
    MASK_TOKENS,
    MAX_ROWS,
    PackedRows,
    crop_layout,
    fill_figure,
    mask_figure,
    read_fill,
    zoom_figure,
)


def write_report(
    run_dir: str | Path,
    dataset: PackedRows | str | Path | None = None,
    evaluation: Mapping[str, Any] | str | Path | None = None,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
    causal_attn: bool = False,
) -> Path:
    """Writes the report of a run folder and returns its path.

    Args:
        run_dir: of a run in any state; holds some of metrics.jsonl, events.jsonl, config.yaml and evaluation.json.
        dataset: packed dataset or its folder; without it, mask and fill are left out.
        evaluation: see report/evaluation_record.py; default RUN/evaluation.json if that exists.
        out: the file to write; default RUN/report.html.
        title: heading; default the folder's name.
        facts: more lines for the table of facts, shown first.
        causal_attn: diffusion.causal_attn of the run, for the mask.

    Raises:
        DataError: the folder holds no run, or one of the files cannot be read.
    """
    run = Path(run_dir)
    if not any((run / name).exists() for name in (METRICS_FILE, EVENTS_FILE, "config.yaml")):
        raise DataError(f"the folder has no {METRICS_FILE}", str(run), "pass the folder of a run (run_dir)")
    records = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).exists() else []
    events, goodput = read_events(run), goodput_of(run)
    rows = _open_dataset(dataset) if dataset is not None else None
    if evaluation is None and (run / "evaluation.json").exists():
        evaluation = run / "evaluation.json"
    page = Page(title or f"Run {run.resolve().name}")
    job_facts = run_sections.job_facts(events, goodput)
    page.section("facts", "Run").facts(
        {**(facts or {}), **job_facts, **_run_facts(records), **_machine_facts(rows, events)}
    )
    run_sections.loss_section(page, records)
    run_sections.chart_sections(page, records, speed=False)
    run_sections.validation_section(page, run, records)
    run_sections.chart_sections(page, records, speed=True)
    run_sections.step_time_section(page, records)
    run_sections.job_sections(page, run, events, goodput)
    if evaluation is not None:
        evaluation_sections(page, load_evaluation(evaluation))
    if (run / SAMPLES_FILE).exists():
        samples_section(page, read_metrics(run / SAMPLES_FILE))
    if rows is not None:
        _dataset_sections(page, rows, causal_attn)
    run_sections.metrics_section(page, records)
    if (run / "config.yaml").exists():
        config = mask_text(
            (run / "config.yaml").read_text(encoding="utf-8", errors="replace")
        )  # of an older version, or edited
        page.section("config", "Configuration").details("config.yaml", config)
    target = Path(out) if out is not None else run / "report.html"
    page.write(target)
    return target


def _open_dataset(dataset: PackedRows | str | Path) -> PackedRows:
    if not isinstance(dataset, (str, Path)):
        return dataset
    from sdlm_megatron.data.format import PackedDataset

    return PackedDataset(dataset)


def _run_facts(records: Records) -> dict[str, str]:
    if not records:
        return {}
    last = records[-1]
    loss = last.get("loss")
    facts = {
        "steps": f"{last['step']} of {last.get('steps', last['step'])}",
        "last loss": f"{loss:.4f}" if isinstance(loss, (int, float)) else json.dumps(loss),
    }
    # a record represents the steps since the one before it
    steps = [int(r["step"]) - int(before["step"]) for before, r in pairwise([{"step": 0}, *records])]
    seconds, useful, targets = (
        sum(n * (r.get(key) or 0) for n, r in zip(steps, records, strict=True))
        for key in ("step_time", "useful_tokens", "targets")
    )
    facts["time in steps"] = format_duration(seconds)
    if seconds > 0 and useful > 0:
        facts["tokens trained"] = (
            f"{format_count(useful)} without padding, {format_count(targets)} targets; "
            f"{format_count(useful / seconds)} tokens per second"
        )
    resumed = [f"step {r['resumed_from']}" for r in records if "resumed_from" in r]
    return facts | ({"resumed after": ", ".join(resumed)} if resumed else {})


def _machine_facts(rows: PackedRows | None, events: Records) -> dict[str, str]:
    facts = {}
    if rows is not None:
        manifest = rows.manifest
        facts["dataset"] = (
            f"{rows.rows(0)} rows of {manifest['row_length']} tokens, block size {manifest['block_size']}, "
            f"repeat {manifest['repeat']}, {float(manifest.get('mean_documents_per_row', 0)):.1f} documents per row"
        )
    start = _last_start(events)
    if "software" not in start:  # of an older version
        return facts | {"this page was written with": software()}
    return facts | {key: str(start.get(key, "")) for key in ("software", "machine")}


def _last_start(events: Records) -> Mapping[str, Any]:
    return next((event for event in reversed(events) if event["kind"] == "start"), {})


def _dataset_sections(page: Page, rows: PackedRows, causal_attn: bool) -> None:
    """The visibility mask of the first row, some of its blocks enlarged, and how rows are filled."""
    count, row_length = rows.rows(0), int(rows.manifest["row_length"])
    if count == 0:
        return
    _, layout = rows.read(0, 0)
    shown = crop_layout(layout)
    cropped = shown.used < layout.used
    length = shown.used if cropped else max(min(row_length, MASK_TOKENS), shown.used)
    section = page.section("mask", "Visibility mask")
    section.text(
        "Documents share a row and do not see each other. The clean tokens of all documents come first, then their "
        "blocks, then padding. This is the first row of the dataset."
        + (f" Shown are {length} of the row's {row_length} tokens." if length < row_length else "")
    )
    section.figure(mask_figure(shown, length, causal_attn=causal_attn), "visibility mask of one packed row")
    with_blocks = np.flatnonzero(shown.n_blocks)
    if len(with_blocks):
        before, rest = "up to", "It holds mask tokens only."
        if shown.target_shift:
            before = "before"
            rest = "The anchor (dotted) is not seen: the block holds a copy as its first token."
        section.text(
            f"A few neighboring blocks of a document, enlarged. A block sees the clean tokens {before} its anchor and "
            f"itself, never another block. {rest}"
        )
        figure = zoom_figure(shown, int(with_blocks[0]), causal_attn=causal_attn)
        section.figure(figure, "visibility of a few blocks")
    section = page.section("fill", "Fill of the rows")
    section.text(
        f"Each bar is a row of {row_length} tokens"
        + (f" ({MAX_ROWS} of {count} rows, at equal distances)" if count > MAX_ROWS else "")
        + ". Padding is the room that packing could not fill with clean tokens and blocks."
    )
    section.figure(fill_figure(read_fill(rows)), "fill of the rows")


# ---------------------------------------------------------------------------------------------------- the command
def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm report", __doc__ or "", example="sdlm report runs/default")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page and prints the goodput."""
    args = build_parser().parse_args(argv)
    if not args.run.is_dir():
        raise DataError("the folder does not exist", str(args.run), "pass the folder of a run (run_dir)")
    config = _config(args.run)
    dataset, facts = _dataset(args.run, config.data.path)
    page = write_report(args.run, dataset, out=args.out, facts=facts, causal_attn=config.diffusion.causal_attn)
    goodput = goodput_of(args.run)
    if goodput is not None:
        print(f"{goodput.share:.1%} of {format_duration(goodput.wall)} was spent in useful steps:")
        for cause, seconds in sorted(goodput.seconds.items(), key=lambda x: -x[1]):
            print(f"  {seconds / goodput.wall:6.1%}  {format_duration(seconds):>7}  {cause}")
    print(f"wrote {page}")


def _dataset(run: Path, path: str) -> tuple[PackedRows | None, dict[str, str]]:
    """The run's dataset if it is still at `path`, and a line of the page where that is not certain."""
    if not path:
        return None, {}
    if not (Path(path) / "manifest.json").exists():
        return None, {"mask and fill": f"left out: there is no dataset at {path}"}
    rows, known = _open_dataset(path), _last_start(read_events(run)).get("dataset")
    if known is None:
        return rows, {"mask and fill": f"of the dataset now at {path}: the run did not record which it read"}
    if known != rows.manifest["checksum"]:
        return None, {"mask and fill": f"left out: the dataset at {path} is not the one that the run read"}
    return rows, {}


def _config(run: Path) -> RunConfig:
    """config.yaml of a run; the defaults if it cannot be read, so that a page is written all the same."""
    try:
        return load_config(RunConfig, str(run.absolute() / "config.yaml"))
    except ConfigError:
        return RunConfig()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
