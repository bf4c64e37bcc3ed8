"""CSV files: records of text, separated by commas and quoted as RFC 4180 says, with the names of the columns first."""

import csv
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from data_prep.input_bytes import MOST_LINE, limited_lines, open_utf8, reading
from sdlm_megatron.errors import DataError

_QUOTES = 'put texts with commas, quotes or line breaks into quotes, and write a quote in them as ""'


def csv_records(file: Path, encoding: str) -> Iterator[list[str]]:
    """The names of the columns, then the records of a file, without empty lines. Bytes that are not UTF-8 become lone
    surrogates, which make a row invalid. DataError if the file is not CSV."""
    csv.field_size_limit(MOST_LINE)
    with reading(file), open_utf8(file, encoding) as content:
        records = csv.reader(_lines(content, file), strict=True)
        try:
            header = next((record for record in records if record), [])
            _check_header(header, file)
            yield header
            yield from (record for record in records if record)
        except csv.Error as error:
            place = f"{file}, line {records.line_num}"
            raise DataError(f"the file is not CSV: {error}", place, _QUOTES) from None


def _lines(content: BinaryIO, file: Path) -> Iterator[str]:
    for i, line in enumerate(limited_lines(content), 1):
        if len(line) > MOST_LINE:
            raise DataError(f"the line has more than {MOST_LINE:,} bytes", f"{file}, line {i}", _QUOTES)
        text = line.decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if i == 1 else text


def _check_header(header: list[str], file: Path) -> None:
    fix = "write the names of the columns into the first line, separated by commas"
    if not header:
        raise DataError("the file has no line with the names of its columns", str(file), fix)
    for name in header:
        if not name.strip() or header.count(name) > 1:
            problem = f"two columns are named {name!r}" if name.strip() else "a column has no name"
            raise DataError(problem, f"{file}, line 1", fix)
    if len(header) == 1 and any(separator in header[0] for separator in ";\t|"):
        raise DataError("the columns are not separated by commas", f"{file}, line 1", "save the file with commas")


@lru_cache(maxsize=256)
def count_csv(file: Path, encoding: str, _: str) -> int:
    """Rows of a file; kept for files with the same stamp, the last argument."""
    return sum(1 for _ in csv_records(file, encoding)) - 1
