"""The supported source formats and file types: the one list behind reading, validation, `--help` and docs/data.md."""

from collections.abc import Collection
from dataclasses import dataclass

TURN_KEYS = (("from", "value"), ("role", "content"))
"""Accepted (role, text) keys of a turn, in order of precedence."""

# Other suffixes in a folder are ignored, so that a README or a script beside the data does no harm.
FILE_TYPES = (".jsonl", ".json", ".parquet", ".arrow")


@dataclass(frozen=True)
class SourceFormat:
    """Columns of a conversation: either `turns`, or `prompt` and `answer`. Other columns are ignored."""

    used_by: str  # data sets with this format, for the documentation
    turns: str = ""  # column with a list of turns, each {role: text, content: text} or {from: text, value: text}
    prompt: str = ""  # column with the user's text
    answer: str = ""  # column with the assistant's text
    keys: tuple[str, str] = TURN_KEYS[1]
    """The usual (role, text) keys of a turn; the other pair of TURN_KEYS is accepted as well."""
    alternative: str = ""  # other accepted content, for the documentation

    @property
    def columns(self) -> tuple[str, ...]:
        """Required columns."""
        return (self.turns,) if self.turns else (self.prompt, self.answer)

    @property
    def description(self) -> str:
        """Columns and their content in one line."""
        if not self.turns:
            return f"`{self.prompt}`, `{self.answer}`"
        return f"`{self.turns}`: list of {{{', '.join(self.keys)}}}{self.alternative}"


# A new row format is one entry here: reading, validation, --help and the table in docs/data.md follow.
FORMATS = {
    "messages": SourceFormat("smoltalk, tulu-3-sft-mixture, Table-GPT", turns="messages"),
    "sharegpt": SourceFormat(
        "local files of the reference code",
        turns="conversations",
        keys=TURN_KEYS[0],
        alternative="; or a meta JSON with `annotation`, `repeat_time`",
    ),
    "query_response": SourceFormat("ScaleQuest-Math", prompt="query", answer="response"),
    "instruction_output": SourceFormat("opc-sft-stage2", prompt="instruction", answer="output"),
    "input_output": SourceFormat("SciRIFF", prompt="input", answer="output"),
}


def formats_with_columns(columns: Collection[str]) -> list[str]:
    """Names of the formats whose columns are all present."""
    return [name for name, form in FORMATS.items() if set(form.columns) <= set(columns)]


def formats_help() -> str:
    """List of the formats for `--help`."""
    lines = [f"  {name:20}{form.description.replace('`', '')}" for name, form in FORMATS.items()]
    return "\n".join(["source formats:", *lines, f"file types: {', '.join(FILE_TYPES)}, or a folder of such files"])


def formats_table() -> str:
    """Markdown table of the formats for docs/data.md."""
    rows = [f"| `{name}` | {form.description} | {form.used_by} |" for name, form in FORMATS.items()]
    return "\n".join(["| format | columns | used by |", "|---|---|---|", *rows])
