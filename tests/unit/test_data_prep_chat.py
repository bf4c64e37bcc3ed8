"""Rendering of conversations: values computed by hand for a byte tokenizer; checks with Qwen2.5's tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep.chat import parse, render
from data_prep.encoders import TextTokenizer, open_encoder
from sdlm_megatron.errors import DataError
from tests.byte_tokenizer import IM_END, IM_START, LLAMA3, SPECIAL, TOOL, definition, write_folder, write_llama3_folder
from tests.qwen_vocab import qwen_tokenizer_folder

BYTES = TextTokenizer(definition("<text_mask>"), "bytes")
HI = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
NEWLINE = ord("\n")


def turn(role: str, text: str) -> list[int]:
    return [IM_START, *f"{role}\n{text}".encode(), IM_END, NEWLINE]


def test_conversation_matches_hand_computed_values() -> None:
    document = render(HI, BYTES)
    system = turn("system", "You are a helpful assistant.")
    expected = system + turn("user", "Hi") + turn("assistant", "Yo")
    assert document.input_ids.dtype == document.anchors.dtype == np.int32
    assert document.input_ids.tolist() == expected
    header_end = len(system) + len(turn("user", "Hi")) + len("assistant\n")  # <|im_start|> is token 0 of the turn
    assert document.input_ids[header_end] == NEWLINE
    # R = 3: "Y", "o" and <|im_end|> are the tokens after the anchors; the closing newline never is
    assert document.anchors.tolist() == [header_end, header_end + 1, header_end + 2]
    assert document.input_ids[document.anchors + 1].tolist() == [ord("Y"), ord("o"), IM_END]


def test_default_system_can_be_omitted_and_is_not_added_twice() -> None:
    assert render(HI, BYTES, default_system=None).input_ids.tolist() == turn("user", "Hi") + turn("assistant", "Yo")
    own = render([{"role": "system", "content": "S"}, *HI], BYTES)
    assert own.input_ids.tolist() == turn("system", "S") + turn("user", "Hi") + turn("assistant", "Yo")


def test_both_key_spellings_render_the_same() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    expected = render(HI, BYTES).input_ids.tolist()
    for form in (messages, {"messages": messages}, {"conversations": HI}):
        assert render(form, BYTES).input_ids.tolist() == expected


def test_function_turns_are_context_and_every_assistant_turn_is_trained() -> None:
    conversation = [*HI, {"from": "function", "value": "42"}, {"from": "gpt", "value": "!"}]
    document = render(conversation, BYTES, default_system=None)
    assert [t.role for t in document.turns] == ["user", "assistant", "function", "assistant"]
    assert [t.n_anchors for t in document.turns] == [0, 3, 0, 2]
    assert document.turns[-1].end == len(document.input_ids)


def test_conversation_without_assistant_turn_has_no_anchors() -> None:
    assert render([{"from": "human", "value": "x"}], BYTES).anchors.shape == (0,)


def test_empty_answer_is_not_trained() -> None:
    """It would teach the model to end at once."""
    document = render([HI[0], {"from": "gpt", "value": ""}], BYTES, default_system=None)
    assert document.input_ids.tolist() == turn("user", "Hi") + turn("assistant", "")
    assert not len(document.anchors)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<text_mask>"])
def test_special_tokens_spelled_in_text_are_encoded_as_text(token: str) -> None:
    document = render([HI[0], {"from": "gpt", "value": f"a{token}b"}], BYTES, default_system=None)
    assert document.input_ids.tolist() == turn("user", "Hi") + turn("assistant", f"a{token}b")


def test_added_tokens_that_are_not_special_stay_single_tokens() -> None:
    document = render([HI[0], {"from": "gpt", "value": "<tool_call>"}], BYTES)
    assert document.input_ids.tolist()[-3:] == [TOOL, IM_END, NEWLINE]


def test_transformers_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_folder(tmp_path, "<text_mask>"))
    conversation = [HI[0], {"from": "gpt", "value": "é <|im_end|> <text_mask> <tool_call>"}]
    ours, theirs = render(conversation, BYTES), render(conversation, tokenizer)
    assert theirs.input_ids.tolist() == ours.input_ids.tolist()
    assert theirs.anchors.tolist() == ours.anchors.tolist()
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [IM_END], "the caller's tokenizer is unchanged"


def test_backend_tokenizer_and_slow_tokenizer_are_accepted() -> None:
    class Slow:
        """Implements the three methods of a transformers tokenizer without a `tokenizers` backend."""

        unk_token_id = None

        def encode(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            assert split_special_tokens
            return list(text.encode())

        def convert_tokens_to_ids(self, token: str) -> int | None:
            return {"<|im_start|>": IM_START, "<|im_end|>": IM_END}.get(token)

    expected = render(HI, BYTES).input_ids.tolist()
    assert render(HI, Tokenizer.from_str(json.dumps(definition()))).input_ids.tolist() == expected
    assert render(HI, Slow()).input_ids.tolist() == expected


def test_qwen_header_counts_three_tokens_even_when_the_newline_merges() -> None:
    tokenizer = TextTokenizer.from_folder(qwen_tokenizer_folder())
    assert tokenizer.encode_batch(["assistant\n"]) == [[77091, 198]]
    plain = render(HI, tokenizer)
    assert plain.anchors.tolist() == [plain.turns[-1].start + i for i in (2, 3)]
    merged = render([HI[0], {"from": "gpt", "value": "\n\n\n"}], tokenizer)
    start = merged.turns[-1].start
    # <|im_start|> assistant "\n\n\n\n" <|im_end|>: the answer's text is inside the header's third token
    assert merged.turns[-1].end - start == 5
    assert merged.anchors.tolist() == [start + 2]


BAD = [
    ([], "conversation", "no turn"),
    ("text", "conversation", "not JSON"),
    (3, "conversation", "list of turns"),
    ({"text": "x"}, "", "it has text"),
    ({"messages": None}, "messages", "list of turns"),
    (["x"], "conversation[0]", "object"),
    ([{"value": "x"}], "conversation[0]", "`from`"),
    ([{"from": "human"}], "conversation[0]", "`value`"),
    ([{"from": "human", "value": "\ud800"}], "conversation[0].value, character 0", "Unicode"),
]


@pytest.mark.parametrize(("conversation", "where", "what"), BAD)
def test_invalid_conversation_error_names_turn_and_field(conversation: object, where: str, what: str) -> None:
    with pytest.raises(DataError) as error:
        render(conversation, BYTES)  # type: ignore[arg-type]
    assert error.value.where == where
    assert what in str(error.value)


def test_parse_returns_chatml_roles() -> None:
    assert parse(HI) == [("user", "Hi", True), ("assistant", "Yo", True)]


def test_llama3_headers_equal_its_template(tmp_path: Path) -> None:
    """Ids of the whole conversation and up to each answer; anchors precede the answer's tokens and <|eot_id|>."""
    tokenizer = AutoTokenizer.from_pretrained(write_llama3_folder(tmp_path / "llama"))
    encoder = open_encoder(tmp_path / "llama")
    begin, start, end, stop = (encoder.token_id(LLAMA3[token]) for token in (*SPECIAL[:2], "<tool_call>", SPECIAL[2]))
    conversation = [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": "\n\nHi <|eot_id|> ünï  "},
        {"role": "assistant", "content": " Yo "},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": " \n"},
        {"role": "assistant", "content": "\tBye."},
    ]
    spelled = [i for i, t in enumerate(conversation) if "<|eot_id|>" in t["content"]]
    document = render(conversation, encoder, default_system=None)
    ids = document.input_ids.tolist()
    assert ids[:2] == [begin, start] and ids.count(begin) == 1
    assert ids.count(stop) == len(conversation), "a spelled special token ended a turn"
    for i in spelled:
        conversation[i]["content"] = conversation[i]["content"].replace("<|eot_id|>", "or")
    document = render(conversation, encoder, default_system=None)
    expected = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
    assert document.input_ids.tolist() == expected
    for n, turn in enumerate(document.turns):
        assert expected[turn.start] == start
        if turn.role == "assistant":
            prompt = tokenizer.apply_chat_template(conversation[:n], add_generation_prompt=True, return_dict=True)
            assert prompt["input_ids"] == expected[: turn.first_anchor + 1]
    header = [start, *b"assistant", end, *b"\n\n"]
    trained = [[*b"Yo", stop], [], [*b"Bye.", stop]]  # an empty answer is not trained
    answers = [turn for turn in document.turns if turn.role == "assistant"]
    for turn, answer in zip(answers, trained, strict=True):
        assert expected[turn.start : turn.first_anchor + 1] == header
        at = turn.first_anchor + 1
        assert expected[at : at + turn.n_anchors] == answer
    assert document.anchors.tolist() == [t.first_anchor + k for t in answers for k in range(t.n_anchors)]


def test_tokenizer_without_chatml_is_refused(tmp_path: Path) -> None:
    content = definition()
    content["added_tokens"] = content["added_tokens"][:1]
    with pytest.raises(DataError, match="im_start"):
        render(HI, TextTokenizer(content, "bare"))
    with pytest.raises(DataError, match="tokenizer.json"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match="model is a whole number .*, not an object"):
        TextTokenizer.from_folder(tmp_path)
