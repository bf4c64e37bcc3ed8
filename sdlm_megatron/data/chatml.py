"""Chat formats shared by data preparation, export and chat: ChatML, Llama 3's headers and Mistral's [INST]."""

from collections.abc import Callable
from dataclasses import dataclass

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
"""System turn prepended to a conversation without one, unless the dataset's settings override it."""


@dataclass(frozen=True)
class ChatFormat:
    """Texts around the content of a turn, in the order of the fields; `document` precedes the first turn.

    `document`, `start`, `role_end` and `end` are special tokens; the first and third may be empty.
    """

    document: str
    start: str
    """Followed by the role."""
    role_end: str
    gap: str
    """Followed by the content."""
    end: str
    tail: str
    strips: bool
    """White space around the content is removed; with `exchanges` around that of answers."""
    exchanges: bool = False
    """A question and its answer are one turn, without roles: start, question, role_end, answer, end. There is no system
    turn."""

    @property
    def specials(self) -> list[str]:
        """Its special tokens."""
        return [token for token in (self.document, self.start, self.role_end, self.end) if token]

    def opening(self, role: str) -> str:
        """Text of a turn before its content."""
        return f"{self.start}{role}{self.role_end}{self.gap}"

    def encoded(self, role: str, text: str) -> str:
        """The part of a turn that is encoded as one text: what follows its last special token before the content."""
        return ("" if self.role_end else role) + self.gap + self.content(text)

    def content(self, text: str) -> str:
        """The content of a turn, as it is rendered."""
        return text.strip() if self.strips else text


CHATML = ChatFormat("", IM_START, "", "\n", IM_END, "\n", strips=False)
LLAMA3 = ChatFormat(
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", strips=True
)
INST = ChatFormat("<s>", "[INST]", "[/INST]", "", "</s>", "", strips=False, exchanges=True)
"""Mistral's templates with tokens for their marks; some have a space before the content (`inst_format`)."""


def format_of(has: Callable[[str], bool]) -> ChatFormat:
    """The first format whose special tokens a tokenizer has; ChatML if there is none.

    Args:
        has: whether a text is a token of the tokenizer.
    """
    return next((known for known in (CHATML, LLAMA3, INST) if all(map(has, known.specials))), CHATML)
