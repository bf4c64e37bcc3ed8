"""JSON files that are not lines of rows: one list, an object around one list, or one object over several lines.

The elements of a list are found by a vectorized scan and read by ranges of bytes, so that several processes share a
file and none holds it in memory.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.input_bytes import MOST_LINE, file_type, limited_lines, open_utf8, reading, skip
from sdlm_megatron.errors import DataError

BLOCK = 1 << 20  # bytes scanned at once
HEAD = 1 << 16  # bytes that show what a file contains
LIST_OF_ROWS = "write one list, [row, row, ...], or one row per line into a .jsonl file"
_LIST = re.compile(rb'(?:\xef\xbb\xbf)?[ \t\r\n]*(?:\{[ \t\r\n]*"((?:[^"\\]|\\.){0,200})"[ \t\r\n]*:[ \t\r\n]*)?\[')
_TURNS = ("messages", "conversations", "conversation", "turns", "history")
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_IS_MARK = _STEP != 0
_IS_MARK[[_QUOTE, _COMMA]] = True
_MARKS = _IS_MARK.tobytes()  # for bytes.translate, which is twice as fast as an index


@dataclass(frozen=True)
class JsonElements:
    """Places of the elements of a JSON list in the decoded content of its file."""

    rows: int
    pieces: tuple[tuple[int, int], ...]
    """(number of its first element, offset of its first byte) of each piece of the list."""
    stop: int  # offset behind the last element


class _Scanner:
    """Finds commas between the elements of a JSON list, block by block."""

    def __init__(self) -> None:
        self._depth = self._in_string = self._backslashes = 0  # state at the end of the last block

    def scan(self, block: bytes) -> tuple[np.ndarray, int]:
        """Offsets (int64) of the commas between elements of the list, and that of its closing bracket, or -1 if it is
        not in this block."""
        codes = np.frombuffer(block, np.uint8)
        at = np.flatnonzero(np.frombuffer(block.translate(_MARKS), bool))
        kinds = codes[at]
        quotes = kinds == _QUOTE
        if self._backslashes or b"\\" in block:
            quotes[quotes] = ~self._escaped(codes, at[quotes])
        inside = (np.cumsum(quotes) + self._in_string) % 2
        steps = np.where(inside, 0, _STEP[kinds])
        depths = np.cumsum(steps, dtype=np.int64) + self._depth
        ends = np.flatnonzero(depths < 0)
        end = int(at[ends[0]]) if len(ends) else -1
        commas = at[(kinds == _COMMA) & (inside == 0) & (depths == 0)]
        if len(at):
            self._depth, self._in_string = int(depths[-1]), int(inside[-1])
        return (commas if end < 0 else commas[commas < end]), end

    def _escaped(self, codes: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """Whether each quote (offset) follows an odd number of backslashes."""
        slashes = np.flatnonzero(codes == _BACKSLASH)
        first = slashes[np.diff(slashes, prepend=-2) > 1]  # of each run of backslashes
        run = np.searchsorted(first, quotes) - 1
        start = first[run] if len(first) else np.zeros(len(quotes), np.int64)
        behind = np.zeros(len(quotes), bool) if not len(first) else (run >= 0) & (codes[quotes - 1] == _BACKSLASH)
        length = np.where(behind, quotes - start + (start == 0) * self._backslashes, 0)
        length[quotes == 0] = self._backslashes
        ends_in_run = len(slashes) and slashes[-1] == len(codes) - 1
        carried = self._backslashes if ends_in_run and first[-1] == 0 else 0
        self._backslashes = (len(codes) - int(first[-1]) + carried) % 2 if ends_in_run else 0
        return length % 2 == 1


def json_elements(file: Path, encoding: str, stamp: str) -> JsonElements | None:
    """Rows of a .json file, or of a .jsonl file with one value over several lines; None if it has a row per line.

    Args:
        encoding: as for `open_utf8`.
        stamp: of the file; what was found is kept for files with the same stamp.

    Raises:
        DataError: the file cannot be read, or is neither a list of rows, an object around one, nor a row.
    """
    return _json_elements(str(file), encoding, stamp)


@lru_cache(maxsize=256)
def _json_elements(name: str, encoding: str, _: str) -> JsonElements | None:
    file = Path(name)
    with reading(file):
        with open_utf8(file, encoding) as content:
            head = content.read(HEAD)
        if file_type(file).content != ".json":
            first, second = _two(line.strip() for line in head.removeprefix(codecs.BOM_UTF8).split(b"\n"))
            if first not in (b"{", b"[", b"[{") or not second or isinstance(_value(second), dict):
                return None
        match = _LIST.match(head)
        if match and (a_list := _list(file, encoding, match)):
            return None if a_list.one_of_many else a_list.elements
        with open_utf8(file, encoding) as content:
            first, second = _two(line for line in limited_lines(content) if not line.isspace())
        row = _value(first)
        # Not JSON by itself: an invalid row, or a value that continues on the next line.
        by_line = isinstance(_value(second), dict) if row is None else bool(second) or is_row(row)
        return None if by_line else _object(file, encoding)


def _two(lines: Iterable[bytes]) -> tuple[bytes, bytes]:
    """The first two lines that are not empty."""
    first, second = islice(chain(filter(None, lines), (b"", b"")), 2)
    return first, second


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_row(value: Any) -> bool:
    """Whether a value may be a row: an object, but not one of objects only, such as ShareGPT's meta JSON."""
    return isinstance(value, dict) and not all(isinstance(part, dict) for part in value.values())


class _FoundList(NamedTuple):
    elements: JsonElements
    one_of_many: bool  # more rows follow on other lines


def _list(file: Path, encoding: str, match: re.Match[bytes]) -> _FoundList | None:
    """The list at the beginning of a file, perhaps in an object; None if the object is not just a wrapper of rows."""
    start, key = match.end(), match[1] and match[1].decode("utf-8", "replace")
    if key in _TURNS:
        return None
    with open_utf8(file, encoding) as content:
        skip(content, start)
        elements, in_one_line, rest = _index(content, start)
    if key is not None:
        wrapped = elements and rest == b"}" and _has_rows(file, encoding, elements)
        return _FoundList(elements, False) if elements and wrapped else None
    if elements is None:
        raise DataError("the file is not JSON: its list has no end", str(file), LIST_OF_ROWS)
    if rest and not in_one_line:
        what = f"the file is not JSON: more follows after its list, which ends at byte {elements.stop:,}"
        raise DataError(what, str(file), LIST_OF_ROWS)
    return _FoundList(elements, bool(rest))


def _index(content: BinaryIO, start: int) -> tuple[JsonElements | None, bool, bytes]:
    """The elements of a list whose bracket is before `start`, or None if it has no end; whether it is in one line; and
    the beginning of what follows it."""
    scanner, at, rows = _Scanner(), start, 0
    blank = in_one_line = True
    pieces = [(0, start)]
    while block := content.read(BLOCK):
        commas, end = scanner.scan(block)
        part = block if end < 0 else block[:end]
        blank, in_one_line = blank and not part.strip(), in_one_line and b"\n" not in part
        rows += len(commas)
        if end >= 0:
            if block[end : end + 1] != b"]":
                break
            rest = block[end + 1 :].strip()
            while len(rest) < 2 and (block := content.read(BLOCK)):
                rest += block.strip()
            return JsonElements(0 if blank else rows + 1, tuple(pieces), at + end), in_one_line, rest
        if len(commas):
            pieces.append((rows, at + int(commas[-1]) + 1))
        at += len(block)
    return None, False, b""


def _has_rows(file: Path, encoding: str, elements: JsonElements) -> bool:
    """Whether the elements of a list in an object are rows, and not turns or texts of a single row."""
    if not elements.rows:
        return True
    with open_utf8(file, encoding) as content:
        first = _value(next(read_elements(content, elements.pieces[0][1], elements.stop, file)))
    return isinstance(first, list) or (isinstance(first, dict) and not {"role", "from"} & first.keys())


def _object(file: Path, encoding: str) -> JsonElements:
    """The only row of a file; DataError if it is not one JSON object."""
    with open_utf8(file, encoding) as content:
        text = content.read(MOST_LINE + 1)
    if len(text) > MOST_LINE:
        raise DataError(f"the file has one value of more than {MOST_LINE:,} bytes", str(file), LIST_OF_ROWS)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file is not JSON: {error}", str(file), LIST_OF_ROWS) from None
    if not is_row(value):
        what = f"the file contains one value of type {type(value).__name__}, not a list of rows"
        raise DataError(what, str(file), LIST_OF_ROWS)
    return JsonElements(1, ((0, 0),), len(text))


def read_elements(content: BinaryIO, start: int, stop: int, file: Path) -> Iterator[bytes]:
    """The elements of a list between two offsets (see JsonElements), as they are written; of one longer than MOST_LINE
    the first MOST_LINE + 1 bytes."""
    scanner, at, begun = _Scanner(), start, bytearray()
    skip(content, start)
    while at < stop:
        block = content.read(min(BLOCK, stop - at))
        if not block:
            raise DataError("the file ends early: it changed while it was read", str(file), "start again")
        first = 0
        for comma in scanner.scan(block)[0].tolist():
            begun += block[first : min(comma, first + MOST_LINE + 1 - len(begun))]
            yield bytes(begun)
            begun.clear()
            first = comma + 1
        begun += block[first : first + MOST_LINE + 1 - len(begun)]
        at += len(block)
    yield bytes(begun)


def read_meta(file: Path) -> dict[str, Any] | None:
    """The entries of a ShareGPT meta JSON; None if the file has rows. DataError if it cannot be read."""
    with reading(file):
        with open_utf8(file) as content:
            first, second = _two(line for line in limited_lines(content) if not line.isspace())
        if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return None
        row = _value(first)
        if second and (row is not None or isinstance(_value(second), dict)):
            return None
        with open_utf8(file) as content:
            text = content.read(MOST_LINE + 1)
    try:
        value = json.loads(text) if len(text) <= MOST_LINE else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file is not JSON: {error}", str(file), LIST_OF_ROWS) from None
    return value if isinstance(value, dict) and (any(map(is_entry, value.values())) or not is_row(value)) else None


def is_entry(value: Any) -> bool:
    """Whether a value is an entry of a ShareGPT meta JSON."""
    return isinstance(value, dict) and "annotation" in value
