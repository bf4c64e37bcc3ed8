"""Data path against the reference's recordings: ids, positions, targets and masks of every good case.

The recordings state which block starts the reference drew; everything else must follow from the conversation.

Intended differences:
- the reference stores labels shifted by one, so the very last slot of the last block has none (ours has);
- `literal_mask` and `user_im_end` spell special tokens inside a message. The reference encodes them as control tokens,
  we encode them as text. `ControlTokensInText` restores the reference's encoding, after which everything is equal;
- a prompt longer than max_length raises in the reference; we drop the document and record the reason.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer

from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import RenderedDocument, render
from data_prep.encoders import TextTokenizer
from data_prep.truncate import LONG_PROMPT, FittedDocument, reference
from sdlm_megatron.data.chatml import IM_END
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.tokenizer_identity import special_token_id
from sdlm_megatron.diffusion.layout import IGNORE, expand_document, row_positions, row_targets
from tests.qwen_vocab import ROOT, qwen_tokenizer_folder

ORACLE = ROOT / "tests" / "golden" / "data"
CASES: list[dict[str, Any]] = json.loads((ORACLE / "preprocess_cases.json").read_text())
SPELLED_SPECIALS = ("literal_mask", "user_im_end")
MASK, EOS, PAD = 151665, 151645, 151643


def test_recording_is_complete() -> None:
    assert (sum(case["ok"] for case in CASES), len(CASES)) == (144, 156)


def name(case: dict[str, Any]) -> str:
    pretraining = "-pt" if case["prepare_for_pt"] else ""
    return f"{case['case']}-{case['conv']}-D{case['D']}-max{case['max_length']}-r{case['repeat']}{pretraining}"


class ControlTokensInText:
    """The reference's encoder: special tokens spelled in a message become those tokens."""

    def __init__(self, folder: Path) -> None:
        self._backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._backend.add_special_tokens([AddedToken("<text_mask>", special=True, normalized=False)])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._backend.encode(text, add_special_tokens=False).ids for text in texts]

    def token_id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        assert index is not None
        return index


@cache
def encoders() -> tuple[TextTokenizer, ControlTokensInText]:
    folder = qwen_tokenizer_folder()
    return TextTokenizer.from_folder(folder), ControlTokensInText(folder)


@cache
def conversations() -> dict[str, list[dict[str, str]]]:
    return json.loads((ORACLE / "conversations.json").read_text())["conversations"]


@cache
def goldens() -> Any:
    return np.load(ORACLE / "preprocess_goldens.npz")


@cache
def rendered(conv: str, pretraining: bool, control_tokens: bool) -> RenderedDocument:
    encoder = encoders()[control_tokens]
    turns = conversations()[conv]
    if pretraining:  # prepare_for_pt: no system turn at all, and the user's turns are trained like the assistant's
        turns = [turn for turn in turns if turn["from"] != "system"]
        return render(turns, encoder, default_system=None, answer_roles=("user", "assistant"))
    return render(turns, encoder)


def fitted(case: dict[str, Any]) -> FittedDocument:
    document = rendered(case["conv"], case["prepare_for_pt"], case["conv"] in SPELLED_SPECIALS)
    return reference(document, max_len=case["max_length"], block_size=case["D"], repeat=case["repeat"])


@pytest.mark.parametrize("case", [case for case in CASES if case["ok"]], ids=name)
def test_case_equals_the_recording(case: dict[str, Any]) -> None:
    golden = {key: goldens()[f"{case['case']}/{key}"] for key in ("input_ids", "labels", "position_ids")}
    document, starts = fitted(case), np.array(case["starts"], dtype=np.int32)
    assert document.n_blocks == case["blocks"]
    assert len(document.input_ids) == case["clean"]
    assert set(starts.tolist()) <= set(document.anchors.tolist())
    expanded = expand_document(document.input_ids, starts, block_size=case["D"], mask_token_id=MASK, eos_token_id=EOS)
    np.testing.assert_array_equal(expanded.input_ids, golden["input_ids"])
    np.testing.assert_array_equal(expanded.position_ids, golden["position_ids"])
    np.testing.assert_array_equal(expanded.targets[:-1], golden["labels"][1:])
    assert golden["labels"][0] == IGNORE
    assert goldens()[f"{case['case']}/attention_mask"].tolist() == [True] * case["total"], "no padding"
    assert int((golden["labels"] != IGNORE).sum()) == case["labelled"]


SETTINGS = sorted({(c["D"], c["max_length"], c["repeat"]) for c in CASES if not c["prepare_for_pt"]})


@pytest.mark.parametrize(("block_size", "max_length", "repeat"), SETTINGS)
def test_whole_pipeline_equals_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: int, max_length: int, repeat: int
) -> None:
    """Conversations in a file -> `build` -> packed rows on disk -> each document's ids, positions and targets.

    Only the random draw of the build is replaced, by the recorded starts. `prepare_for_pt` is not a build setting; its
    cases are tested above.
    """
    settings = (block_size, max_length, repeat)
    cases = [c for c in CASES if (c["D"], c["max_length"], c["repeat"]) == settings and not c["prepare_for_pt"]]
    cases = [c for c in cases if c["conv"] not in SPELLED_SPECIALS]
    with open(tmp_path / "conversations.jsonl", "w") as file:
        for case in cases:
            file.write(json.dumps({"conversations": conversations()[case["conv"]]}) + "\n")

    def recorded(n_anchors: np.ndarray, n_drawn: np.ndarray, documents: np.ndarray, **_: int) -> np.ndarray:
        positions, first = [], 0
        for anchors, drawn, number in zip(n_anchors, n_drawn, documents, strict=True):
            assert drawn == len(cases[number]["starts"])
            legal = fitted(cases[number]).anchors
            assert len(legal) == anchors
            positions.append(first + np.searchsorted(legal, cases[number]["starts"]))
            first += anchors
        return np.concatenate(positions).astype(np.int64)

    monkeypatch.setattr("data_prep.rows.draw_many", recorded)
    source = SourceConfig(name="oracle", format="sharegpt", path=str(tmp_path / "conversations.jsonl"))
    config = BuildConfig(
        out=str(tmp_path / "data"),
        tokenizer=str(qwen_tokenizer_folder()),
        sources=[source],
        block_size=block_size,
        repeat=repeat,
        max_document_length=max_length,
        row_length=16384,
        overlong="reference",
    )
    manifest = build(config, Console(quiet=True))
    assert manifest["accounting"]["rows"] == len(cases)
    dataset, seen = PackedDataset(config.out), []
    for i in range(dataset.rows(0)):
        tokens, layout = dataset.read(0, i)
        parts = (tokens, row_positions(layout), row_targets(tokens, layout, EOS))
        clean = np.cumsum([0, *layout.clean_lens])
        blocks = layout.n_clean + block_size * np.cumsum([0, *layout.n_blocks])
        for k, number in enumerate(layout.doc_ids.tolist()):
            whole = [np.concatenate([p[clean[k] : clean[k + 1]], p[blocks[k] : blocks[k + 1]]]) for p in parts]
            golden = {n: goldens()[f"{cases[number]['case']}/{n}"] for n in ("input_ids", "labels", "position_ids")}
            np.testing.assert_array_equal(whole[0], golden["input_ids"])
            np.testing.assert_array_equal(whole[1], golden["position_ids"])
            np.testing.assert_array_equal(whole[2][:-1], golden["labels"][1:])
            seen.append(number)
    trains = [i for i, case in enumerate(cases) if case["ok"] and case["blocks"]]
    assert sorted(seen) == trains


@pytest.mark.parametrize("case", [case for case in CASES if not case["ok"]], ids=name)
def test_prompt_longer_than_max_length_is_dropped(case: dict[str, Any]) -> None:
    document = fitted(case)
    assert (document.n_blocks, document.drop_reason) == (0, LONG_PROMPT)


@pytest.mark.parametrize("conv", SPELLED_SPECIALS if CASES else ())
def test_spelled_special_tokens_stay_text(conv: str) -> None:
    """The only difference from the reference in these cases: ids of the spelled tokens."""
    ours, theirs = rendered(conv, False, False), rendered(conv, False, True)
    n_turns = len(conversations()[conv]) + 1
    closing = special_token_id(qwen_tokenizer_folder(), IM_END)
    assert MASK not in ours.input_ids
    assert (ours.input_ids == closing).sum() == n_turns
    assert len(ours.input_ids) > len(theirs.input_ids)
    text = TextTokenizer.from_folder(qwen_tokenizer_folder())._backend
    decoded = text.decode(
        [int(i) for i in ours.input_ids if i not in (closing, closing - 1)], skip_special_tokens=False
    )
    for turn in conversations()[conv]:
        assert turn["value"] in decoded
