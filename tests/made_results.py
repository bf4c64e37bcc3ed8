"""Result files of evaluation.* with synthetic figures, for tests of pages and documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = 60
FACTS = {
    "command": "python -m sdlm_megatron.evaluation.sweep --model hf",
    "prompts": "held_out.jsonl",
    "n_prompts": PROMPTS,
    "parameters": 1000,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "date": "2026-11-22",
    "torch": "2",
    "transformers": "5",
}
TAUS = (0.5, 0.7, 0.8, 0.9, 0.98)


def sweep(rng: np.random.Generator, n: int, quality: float) -> dict[str, Any]:
    """Autoregressive decoding; with a window (n > 1) also both confidences at all thresholds and self-speculation."""
    tokens = rng.integers(20, 60, PROMPTS)
    settings: list[tuple[str, int, float | None, float, float]] = [("ar", 1, None, quality, 1.0)]
    if n > 1:
        for alg, gain in (("prob_conf", 0.9), ("entropy_conf", 0.8)):
            settings += [
                (alg, n, tau, quality - 0.7 * (1 - tau), 1 + (n - 1) * gain * (1 - tau) ** 0.25) for tau in TAUS
            ]
        settings.append(("self_speculative", n, None, quality, 1 + 0.7 * (n - 1)))
    rows = []
    for alg, window, tau, right, speed in settings:
        passes = np.maximum(1, tokens / speed + rng.normal(0, 1, PROMPTS)).astype(int)
        rows.append(
            {
                "alg": alg,
                "n": window,
                "threshold": tau,
                "exact": (rng.random(PROMPTS) < right).astype(int).tolist(),
                "tokens": tokens.tolist(),
                "passes": passes.tolist(),
                "decoded": PROMPTS,
            }
        )
    return {"rows": rows, "probe_checked": {}}


def calibration(rng: np.random.Generator, n: int) -> dict[str, Any]:
    slots = []
    for slot in range(n):
        prob = rng.beta(6 / (1 + slot), 0.6, 400)
        right = rng.random(400) < prob ** (1 + 0.2 * slot)
        slots.append(
            {
                "slot": slot,
                "prob": prob.round(4).tolist(),
                "entropy": (prob**0.5).round(4).tolist(),
                "right": right.astype(int).tolist(),
            }
        )
    return {"slots": slots}


def speed(rng: np.random.Generator, n: int) -> dict[str, Any]:
    even, decodes = [], []
    for batch in (1, 16):
        for context in (64, 1024):
            for what in ("window", "window_one"):
                for width in (2, 4, 8):
                    cost = 1 + 0.05 * width * (1 + (what == "window")) + batch * context / 30000
                    where = {"batch": batch, "context": context}
                    even.append(
                        {"what": what, "n": width, **where, "tokens": cost, "low": cost - 0.1, "high": cost + 0.2}
                    )
        settings = [("ar", 1, None, 1.0)]
        if n > 1:
            settings += [("prob_conf", n, 0.98, 2.5), ("prob_conf", n, 0.9, 3.0), ("self_speculative", n, None, 1.4)]
        for alg, width, tau, gain in settings:
            seconds = 48 * 2.0 / gain / batch**0.5 * rng.uniform(0.9, 1.1)
            decodes.append(
                {
                    "alg": alg,
                    "n": width,
                    "threshold": tau,
                    "batch": batch,
                    "prompts": 48,
                    "exact": 40,
                    "tokens": 48 * 40,
                    "passes": 48 * 16,
                    "seconds": seconds,
                }
            )
    return {"passes": [], "break_even": even, "decodes": decodes}


def context(rng: np.random.Generator, n: int) -> dict[str, Any]:
    rows = []
    for shots in (0, 4, 16):
        for alg, width, tau in (("ar", 1, None), ("prob_conf", n, 0.98))[: 1 + (n > 1)]:
            rows.append(
                {
                    "shots": shots,
                    "context": 60.0 + 70 * shots,
                    "alg": alg,
                    "n": width,
                    "threshold": tau,
                    "exact": rng.integers(0, 2, 20).tolist(),
                    "tokens": [40] * 20,
                    "passes": [40 if alg == "ar" else 14 + shots // 4] * 20,
                    "seconds": 20.0 + shots,
                }
            )
    return {"rows": rows}


def perplexity(rng: np.random.Generator) -> dict[str, Any]:
    names = ("Python 3.11.2, docstrings of argparse, copy, heapq", "a README")
    values = [(name, float(v)) for name, v in zip(names, rng.uniform(15, 25, 2), strict=True)]
    return {
        "texts": [
            {"name": name, "tokens": 700, "nll": float(np.log(v)), "perplexity": v, "sha256": f"sha of {name}"}
            for name, v in values
        ]
    }


def serving(rng: np.random.Generator, n: int) -> dict[str, Any]:
    rows = []
    for alg, width, tau in (("plain serving", 1, None), ("prob_conf", n, 0.98), ("ar", 1, None)):
        answers = {"tokens": [40] * 8, "first": rng.random(8).tolist(), "seconds": (1 + rng.random(8)).tolist()}
        row = {"alg": alg, "n": width, "threshold": tau, "at": 4, "wall": float(2 + rng.random()), "client_cpu": 0.1}
        rows.append({**row, "passes": 320.0 / width, **answers})  # without expected answers
    return {"rows": rows, "refused": {}}


def write_results(folder: Path, *, n: int = 4, seed: int = 0, quality: float = 0.95) -> Path:
    """Writes all six files of a model with windows of n (1: autoregressive only)."""
    rng = np.random.default_rng(seed)
    made = {
        "sweep": sweep(rng, n, quality),
        "calibration": calibration(rng, n),
        "speed": speed(rng, n),
        "context": context(rng, n),
        "perplexity": perplexity(rng),
        "serving": serving(rng, n),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in made.items():
        header = {"kind": kind, "model": "hf", "facts": {**FACTS, "block_size": n}}
        header["settings"] = {"prompts_sha256": "sha of held_out.jsonl"}
        (folder / f"{kind}.json").write_text(json.dumps(header | value))
    return folder
