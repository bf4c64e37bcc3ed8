"""evaluation.json: what was measured when the exported model was decoded; one owner of its form.

    {"prompts": 128,
     "rows":     [{"name": "tau 0.98", "alg": "prob_conf", "n": 4, "threshold": 0.98,
                   "tokens_per_pass": 3.1, "exact": 0.98, "n_prompts": 128}, ...],
     "baseline": [{"name": "untouched model, n = 1", "alg": "greedy", "n": 1, "threshold": null, ...}],
     "sample":   {"prompt": "...", "answer_tokens": [{"text": "{", "pass": 1}, ...], "expected": "..."}}

`exact` is a share (0..1) of n_prompts, `pass` counts from 1, `threshold` is null where there is none (n = 1).
`baseline` and `sample` may be absent; a row may hold more fields.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import DataError

_ROW: dict[str, Any] = {
    "name": str,
    "alg": str,
    "n": int,
    "threshold": (int, float, type(None)),
    "tokens_per_pass": (int, float),
    "exact": (int, float),
    "n_prompts": int,
}
_FIX = "write it as sdlm_megatron/report/evaluation_record.py describes"


def load_evaluation(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Reads and checks an evaluation from a file or an object; DataError names the field that is wrong."""
    where = "evaluation"
    value: Any = source
    if isinstance(source, (str, Path)):
        where = str(source)
        try:
            value = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"the evaluation cannot be read: {error}", where, _FIX) from None
    if not isinstance(value, Mapping):
        raise DataError("the evaluation is no object", where, _FIX)
    found: dict[str, Any] = {
        "prompts": value.get("prompts"),
        "rows": value.get("rows"),
        "baseline": value.get("baseline") or [],
    }
    for part in ("rows", "baseline"):
        if not isinstance(found[part], list):
            raise DataError(f"{part} is no list", f"{where}, {part}", _FIX)
        for n, row in enumerate(found[part]):
            _check_row(row, f"{where}, {part}[{n}]")
    if value.get("sample") is not None:
        _check_sample(value["sample"], f"{where}, sample")
        found["sample"] = value["sample"]
    return found


def _check_row(row: Any, where: str) -> None:
    for key, kind in _ROW.items():
        if not isinstance(row, Mapping) or key not in row:
            raise DataError(f"the field {key} is missing", where, _FIX)
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise DataError(f"the field {key} is {row[key]!r}", where, _FIX)
    if not 0 <= row["exact"] <= 1:
        raise DataError(f"exact is a share between 0 and 1, not {row['exact']}", where, _FIX)


def _check_sample(sample: Any, where: str) -> None:
    tokens = sample.get("answer_tokens") if isinstance(sample, Mapping) else None
    if not isinstance(tokens, list) or not isinstance(sample.get("prompt"), str):
        raise DataError("a sample holds prompt and answer_tokens", where, _FIX)
    for n, token in enumerate(tokens):
        good = isinstance(token, Mapping) and isinstance(token.get("text"), str)
        if not good or not isinstance(token.get("pass"), int):
            raise DataError("a token holds text and pass", f"{where}, answer_tokens[{n}]", _FIX)
