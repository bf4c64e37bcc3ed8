"""The tables of docs/evidence.md, in Markdown. Each takes the campaign; "" where nothing was measured."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dev.evidence import arms
from dev.evidence.arms import ARMS
from dev.evidence.campaign import BASE, TASKS, Campaign, text_of
from sdlm_megatron.evaluation.intervals import (
    Estimate,
    acceptance,
    average_precision,
    bins_of,
    brier,
    difference,
    over_seeds,
)
from sdlm_megatron.evaluation.page import change, number, percent
from sdlm_megatron.evaluation.result_files import (
    Result,
    context_rows,
    exact_of,
    name_of,
    perplexities,
    pick,
    points,
    pooled,
    timings,
)

LEADING = [arm.name for arm in arms.MAIN]
BLOCKS = [arm.name for arm in arms.MAIN if arm.block_size > 1]
VARIANTS = [arm.name for arm in arms.VARIANTS]
RATES = ["ar", "d4", *(arm.name for arm in arms.RATES)]
SENSITIVE = ["ar", "d4", "d8", *(arm.name for arm in arms.SENSITIVITY)]
SETTINGS: list[tuple[str, float | None]] = [("ar", None), ("prob_conf", 0.98), ("prob_conf", 0.9)]
KEPT_AT = (0.9, 0.98)
SHOWN_PASSES = {"window": "n kept tokens", "window_one": "one kept token", "self_speculative": "self-speculation"}


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; "" without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def runs(campaign: Campaign) -> str:
    rows = []
    for arm in ARMS.values():
        taken = campaign.seconds.get(arm.name)
        if taken:
            minutes = f"{np.mean(list(taken.values())) / 60:.0f}"
            rows.append((arm.name, arm.text, len(taken), f"{arm.share:g}", arm.block_size, f"{arm.lr:g}", minutes))
    return markdown(("arm", "", "seeds", "share of the conversations", "D", "learning rate", "minutes a model"), rows)


# ----------------------------------------------------------------------------------------------- quality
def asked(sweeps: Sequence[Result]) -> int:
    """Prompts of all seeds."""
    return sum(len(one["rows"][0]["exact"]) for one in sweeps)


def _models(campaign: Campaign, arms: Sequence[str]) -> str:
    rows = []
    for task, words in TASKS.items():
        for arm in arms:
            seeds = list(campaign.seeds(task, "sweep", arm).values())
            if not seeds:
                continue
            given = points(seeds)
            chosen = [pick(given, alg, tau) for alg, tau in SETTINGS]
            drafted = pick(given, "self_speculative")
            exact = ["–" if p is None else percent(p.exact) for p in chosen]
            speed = ["–" if p is None else number(p.speed) for p in [*chosen[1:], drafted]]
            rows.append((words, text_of(arm), len(seeds), asked(seeds), *exact, *speed))
    heads = ("task", "", "seeds", "prompts", "exact, n = 1", "exact, τ = .98", "exact, τ = .9")
    return markdown((*heads, "tokens a pass, τ = .98", "τ = .9", "self-speculative"), rows)


def main(campaign: Campaign) -> str:
    return _models(campaign, [BASE, *LEADING])


def variants(campaign: Campaign) -> str:
    return _models(campaign, VARIANTS)


def sensitivity(campaign: Campaign) -> str:
    return _models(campaign, SENSITIVE)


def rates(campaign: Campaign) -> str:
    return _models(campaign, RATES)


def verdict(gap: Estimate) -> str:
    """What an interval allows to say."""
    if not gap.excludes(0.0):
        return "not told apart"
    return "better" if gap.value > 0 else "worse"


def _differences(campaign: Campaign, pairs: Sequence[tuple[str, str]]) -> str:
    """Arms less another arm, seed by seed; the other with the same setting, or n = 1 where it has no other."""
    rows = []
    for task, words in TASKS.items():
        for arm, to in pairs:
            base, mine = campaign.seeds(task, "sweep", to), campaign.seeds(task, "sweep", arm)
            both = sorted(mine.keys() & base.keys())
            for alg, tau in SETTINGS if both else ():
                own = exact_of([mine[seed] for seed in both], alg, tau)
                other = [base[seed] for seed in both]
                theirs = exact_of(other, alg, tau) or exact_of(other, "ar", None)
                if own is None or theirs is None:
                    continue
                count = min(len(own[0]), len(theirs[0]))  # the first prompts are the same, a variant is asked fewer
                own, theirs = ([answers[:count] for answers in seeds] for seeds in (own, theirs))
                gap = difference(own, theirs)
                gaps = np.asarray(own) - np.asarray(theirs)
                names = (words, text_of(arm), text_of(to), name_of((alg, 1, tau)).split(", n")[0])
                only = f"{(gaps > 0).sum()} / {(gaps < 0).sum()}"
                rows.append((*names, len(both), gaps.size, change(gap), only, verdict(gap)))
    heads = ("task", "", "against", "decoding", "seeds", "prompts", "points", "only this / only that right", "")
    return markdown(heads, rows)


def differences(campaign: Campaign) -> str:
    return _differences(campaign, [(arm, LEADING[0]) for arm in LEADING[1:]])


def variant_differences(campaign: Campaign) -> str:
    return _differences(campaign, [(arm, VARIANTS[0]) for arm in VARIANTS[1:]])


def rate_differences(campaign: Campaign) -> str:
    """At the small rate, at each one's better rate, with the loss that helps SDLM; then a rate against the other."""
    own = [("ar_slow", "ar"), ("d4_slow", "d4")]
    return _differences(campaign, [*((arm, "ar_slow") for arm in ("d4_slow", "d4", "next_token")), *own])


def curve(campaign: Campaign) -> str:
    rows = []
    for task, words in TASKS.items():
        for arm in BLOCKS:
            seeds = list(campaign.seeds(task, "sweep", arm).values())
            rows += [
                (words, text_of(arm), p.name, len(seeds), percent(p.exact), number(p.speed))
                for p in (points(seeds) if seeds else ())
            ]
    return markdown(("task", "", "decoding", "seeds", "exact", "tokens a pass"), rows)


# -------------------------------------------------------------------------------------------- confidence
def _shares(values: Sequence[float]) -> Estimate:
    """Over seeds, of figures between 0 and 1: Student's interval knows no bounds."""
    found = over_seeds(values)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0))


def _by_seed(seeds: Sequence[Result], slot: int, score: str, of: Callable[..., float]) -> Estimate:
    return _shares([of(one["slots"][slot][score], one["slots"][slot]["right"]) for one in seeds])


def _ece(confidence: Sequence[float], right: Sequence[int]) -> float:
    return bins_of(confidence, right).ece


def calibration(campaign: Campaign) -> str:
    rows = []
    for words, arm, seeds in _calibrations(campaign):
        for slot in range(len(seeds[0]["slots"])):
            right = _shares([float(np.mean(one["slots"][slot]["right"])) for one in seeds])
            scores = [
                number(_by_seed(seeds, slot, score, of), 3)
                for score in ("prob", "entropy")
                for of in (_ece, brier, average_precision)
            ]
            rows.append((words, text_of(arm), slot + 1, percent(right), *scores))
    scores = [f"{name}, {score}" for score in ("prob", "entropy") for name in ("ECE", "Brier", "AP")]
    return markdown(("task", "", "slot", "right", *scores), rows)


def kept(campaign: Campaign) -> str:
    rows = []
    for words, arm, seeds in _calibrations(campaign):
        slots = pooled(seeds)
        columns = [acceptance([one["prob"] for one in slots], tau) for tau in KEPT_AT]
        for j, slot in enumerate(slots):
            cells = [f"{share[j]:.1%} ({'–' if np.isnan(given[j]) else f'{given[j]:.1%}'})" for share, given in columns]
            rows.append((words, text_of(arm), j + 1, len(slot["right"]), *cells))
    heads = ("task", "", "slot", "places")
    return markdown((*heads, *(f"kept at τ = {tau:g} (if all before are)" for tau in KEPT_AT)), rows)


def _calibrations(campaign: Campaign) -> Iterator[tuple[str, str, list[Result]]]:
    for task, words in TASKS.items():
        for arm in BLOCKS:
            seeds = list(campaign.seeds(task, "calibration", arm).values())
            if seeds:
                yield words, arm, seeds


# -------------------------------------------------------------------------------------------------- time
def walltime(campaign: Campaign) -> str:
    rows = []
    for task, words in TASKS.items():
        for arm in LEADING:
            seeds = list(campaign.seeds(task, "speed", arm).values())
            for t in timings(seeds) if seeds else ():
                gain = number(over_seeds([_gain(one, t.alg, t.threshold, t.batch) for one in seeds]))
                cells = (len(seeds), t.prompts, f"{t.exact:.1%}", number(t.rate, 1), number(t.seconds, 3))
                rows.append((words, text_of(arm), t.batch, t.name, *cells, gain))
    heads = ("task", "", "batch", "decoding", "seeds", "prompts", "exact")
    return markdown((*heads, "tokens a second", "seconds a prompt", "times n = 1 of this model"), rows)


def _gain(speed: Result, alg: str, threshold: float | None, batch: int) -> float:
    rate = {
        (row["alg"], row["threshold"]): row["tokens"] / float(np.median(row["seconds"]))
        for row in speed["decodes"]
        if row["batch"] == batch
    }
    return float(rate[alg, threshold] / rate["ar", None])


def overhead(campaign: Campaign) -> str:
    rows = []
    for arm in BLOCKS:
        seeds = next((s for task in TASKS if (s := campaign.seeds(task, "speed", arm))), {})
        for one in list(seeds.values())[:1]:
            for r in one.get("break_even", []):
                cost = number(Estimate(r["tokens"], r["low"], r["high"]))
                rows.append((text_of(arm), r["batch"], r["context"], r["n"], SHOWN_PASSES[r["what"]], cost))
    return markdown(("", "batch", "tokens before", "n", "pass", "causal steps (quartiles)"), rows)


def context(campaign: Campaign) -> str:
    rows = []
    for task, words in TASKS.items():
        for arm in LEADING:
            seeds = list(campaign.seeds(task, "context", arm).values())
            for r in context_rows(seeds) if seeds else ():
                where = (words, text_of(arm), r["shots"], f"{r['context']:.0f}")
                setting = name_of((r["alg"], r["n"], r["threshold"]))
                cells = (len(seeds), asked(seeds), percent(r["exact"]), number(r["speed"]), number(r["rate"], 1))
                rows.append((*where, setting, *cells))
    heads = ("task", "", "examples", "tokens before", "decoding", "seeds", "prompts")
    return markdown((*heads, "exact", "tokens a pass", "tokens a second"), rows)


# ----------------------------------------------------------------------------------------------- forgetting
def perplexity(campaign: Campaign) -> str:
    results = campaign.of("", "perplexity", [BASE, *LEADING, *VARIANTS[1:], *RATES[2:]])
    if not results:
        return ""
    texts = perplexities(results)
    rows = [(label, len(results[label]), *(number(row[label]) for row in texts.values())) for label in results]
    return markdown(("", "seeds", *texts), rows)


TABLES: dict[str, Callable[[Campaign], str]] = {
    table.__name__: table
    for table in (
        runs,
        main,
        differences,
        curve,
        calibration,
        kept,
        walltime,
        overhead,
        context,
        variants,
        variant_differences,
        sensitivity,
        rates,
        rate_differences,
        perplexity,
    )
}
