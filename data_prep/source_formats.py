"""The supported source formats and file types: the one list behind reading, validation, `--help` and docs/data.md."""

from collections.abc import Collection
from dataclasses import dataclass, field

# Other suffixes in a folder are ignored, so that a README or a script beside the data does no harm.
FILE_TYPES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv")

FIELD_NAMES = (
    *("turns", "prompt", "input", "answer", "system", "history", "tools", "weight"),
    *("text", "role", "content", "chosen", "rejected", "label"),
)
"""Names that the setting `columns` maps to columns; `role` and `content` are keys of a turn."""
# Read in every format: they are part of the conversation wherever they hold something.
_EVERYWHERE = {"system": "system", "tools": "tools"}


@dataclass(frozen=True)
class SourceFormat:
    """Columns of a conversation, by our names (FIELD_NAMES). All but the optional ones must exist."""

    required: dict[str, str]
    used_by: str  # data sets with this format, for the documentation
    optional: dict[str, str] = field(default_factory=dict)
    content: str = ""  # content of the columns, for the documentation

    @property
    def columns(self) -> tuple[str, ...]:
        """Required columns."""
        return tuple(self.required.values())

    @property
    def fields(self) -> dict[str, str]:
        """All columns that are read, by our names."""
        pair = {"label": "label"} if "answer" in self.required else {}
        history = {"history": "history"} if pair else {}
        return {**_EVERYWHERE, **history, **pair, **self.optional, **self.required}

    @property
    def description(self) -> str:
        """Columns and their content in one line."""
        names = ", ".join(f"`{column}`" for column in self.columns)
        optional = f" (and {', '.join(f'`{column}`' for column in self.optional.values())})" if self.optional else ""
        return f"{names}{optional}{': ' if names and self.content else ''}{self.content}"


def _pair(prompt: str, answer: str, used_by: str, **optional: str) -> SourceFormat:
    return SourceFormat({"prompt": prompt, "answer": answer}, used_by, optional)


# A new row format is one entry here: reading, validation, --help and the table in docs/data.md follow.
FORMATS = {
    "messages": SourceFormat(
        {"turns": "messages"},
        "smoltalk, tulu-3-sft-mixture, Table-GPT, files for chat APIs",
        content="list of {role, content}, with `tool_calls`",
    ),
    "sharegpt": SourceFormat(
        {"turns": "conversations"},
        "ShareGPT, local files of the reference code",
        content="list of {from, value}; or a meta JSON with `annotation`, `repeat_time`",
    ),
    "turns": SourceFormat({}, "files without column names", content="each row is a list of turns"),
    "query_response": _pair("query", "response", "ScaleQuest-Math"),
    "instruction_output": _pair(
        "instruction", "output", "alpaca, opc-sft-stage2", input="input", system="system", history="history"
    ),
    "input_output": _pair("input", "output", "SciRIFF"),
    "instruction_response": _pair("instruction", "response", "dolly", input="context"),
    "prompt_completion": _pair("prompt", "completion", "files for completion APIs"),
    "prompt_response": _pair("prompt", "response", "many"),
    "question_answer": _pair("question", "answer", "gsm8k"),
    "text": SourceFormat(
        {"text": "text"}, "rendered files", content="ChatML, read as its turns; other text is one answer"
    ),
    "preference": SourceFormat(
        {"chosen": "chosen", "rejected": "rejected"},
        "files for DPO",
        {"prompt": "prompt"},
        "texts or lists of turns, with the setting `preference`",
    ),
    "columns": SourceFormat({}, "any other names", content="the columns that the setting `columns` names"),
}


def formats_with_columns(columns: Collection[str]) -> list[str]:
    """Names of the formats whose required columns are all present, without those that another one reads as well:
    `instruction`, `input` and `output` are alpaca's, not `input_output`."""
    present = set(columns)
    matches = [name for name, form in FORMATS.items() if form.required and set(form.columns) <= present]
    return [name for name in matches if not any(_includes(FORMATS[other], FORMATS[name]) for other in matches)]


def _includes(form: SourceFormat, other: SourceFormat) -> bool:
    return set(other.columns) <= set(form.fields.values()) and not set(form.columns) <= set(other.fields.values())


def formats_help() -> str:
    """List of the formats for `--help`."""
    lines = [f"  {name:21}{form.description.replace('`', '')}" for name, form in FORMATS.items()]
    return "\n".join(["source formats:", *lines, f"file types: {', '.join(FILE_TYPES)}, or a folder of such files"])
