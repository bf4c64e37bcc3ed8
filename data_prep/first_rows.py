"""The first rows of each source, read before a build starts: their format, and fields that would be lost."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from data_prep.build_config import SourceConfig
from data_prep.documents import UnitResult
from data_prep.forms import FormReader, InputRow, detect_format, further_names
from data_prep.readers import InputUnit, plan_units, read_unit, where
from data_prep.source_formats import FORMATS
from sdlm_megatron.errors import DataError

# Rows that show the format, and rows of which every field is checked: both take well under a second per source.
DETECTED, CHECKED = 100, 1000
PER_FILE = 3  # rows of every file that show its format, however many files there are


def first_rows(
    source: SourceConfig, units: Sequence[InputUnit], most: int, least: int = 0
) -> Iterator[tuple[InputUnit, InputRow]]:
    """Rows from the starts of a source's files, with the units that contain them: up to `most` in equal shares, of so
    many files, evenly spaced; or `least` of every file, if that is set and more. `units` are those of the source."""
    starts = [unit for unit in units if not unit.start]
    share = max(-(-most // max(1, len(starts))), least)
    if not least and len(starts) > most:
        starts = [starts[i * len(starts) // most] for i in range(most)]
    for unit in starts:
        for row in islice(read_unit(unit, source), share):
            yield unit, row


def with_formats(sources: list[SourceConfig]) -> list[SourceConfig]:
    """The sources with the detected format where none is set; raises DataError where not exactly one matches."""
    return [source if source.format else replace(source, format=detect_source_format(source)) for source in sources]


def detect_source_format(source: SourceConfig) -> str:
    """The format that the first rows of each file of a source match; raises DataError if not exactly one does."""
    rows, fields = list[tuple[str, Any]](), dict[str, list[frozenset[str]]]()
    for unit, row in first_rows(source, plan_units([source]), DETECTED, PER_FILE):
        rows.append((where(unit, row.place, 0), row.content))
        if isinstance(row.content, dict):
            fields.setdefault(unit.file, []).append(frozenset(row.content))
    form = detect_format(rows, source)
    columns = {source.columns.get(name, column) for name, column in FORMATS[form].required.items()}
    fits = {file: any(columns <= names for names in own) for file, own in fields.items()}
    if others := [file for file in fits if not fits[file]]:
        what = f"the files of source {source.name!r} have two forms: {len(others):,} of {len(fits):,} are not {form}"
        has = f"{others[0]} has {', '.join(map(str, sorted(fields[others[0]][0])))}"
        same = next((f"; {form} is {file}" for file in fits if fits[file]), "")
        raise DataError(what, has + same, "give each form an --input or source of its own, or leave the file out")
    return form


def check_fields(sources: list[SourceConfig], units: Sequence[InputUnit], system_prompt: str | None) -> None:
    """Raises DataError if the first rows of a source have fields that hold something and are neither read nor ignored,
    and ConfigError if its columns contradict its format."""
    for number, source in enumerate(sources):
        reader, places = FormReader(source, system_prompt), dict[str, str]()
        n_rows = 0
        for unit, row in first_rows(source, [unit for unit in units if unit.source == number], CHECKED):
            n_rows += 1
            # A row that cannot be read is rejected later, with its reason.
            try:
                reader.read(row.content)
            except DataError:
                continue
            finally:
                for name in reader.unread.keys() - places.keys():
                    places[name] = where(unit, row.place, 0)
        if reader.unread:
            raise unread_error(source, dict(reader.unread), n_rows, next(iter(places.values())))


def unread_error(source: SourceConfig, unread: Mapping[str, int], rows: int, place: str) -> DataError:
    """Error about fields that would be lost.

    Args:
        unread: number of rows by field.
        rows: number of rows that were read.
        place: file and row of the first of them; or empty.
    """
    counts = ", ".join(f"`{name}` in {n:,}" for name, n in sorted(unread.items(), key=lambda item: -item[1]))
    what = f"source {source.name!r} has fields that the format {source.format} does not read: {counts} of {rows:,} rows"
    fix = f"{source.option('ignore', sorted({*unread, *source.ignore}))} leaves them out"
    if columns := [name for name in unread if "." not in name]:
        named = source.option("columns", {"NAME": columns[0]})
        fix += f"; {named} reads one (NAME: {', '.join(further_names(source))})"
    if any(name.endswith("reasoning_content") for name in unread):
        fix += "; to train the reasoning, write it into the text of its turn"
    if any(word in name.lower() for word in ("image", "audio", "video") for name in unread):
        fix += "; only text can be trained, so rows that need images or sound are better removed"
    return DataError(what, place, fix)


def check_results(
    sources: Sequence[SourceConfig], units: Sequence[InputUnit], results: Sequence[UnitResult]
) -> tuple[dict[str, dict[str, int]], DataError | None]:
    """Fields of all rows that would be lost, with their numbers of rows, by name of the source; and the error about
    the first such source. Empty and None if there are none."""
    by_source: dict[str, dict[str, int]] = {}
    error = None
    for number, source in enumerate(sources):
        own = [(unit.file, result) for unit, result in zip(units, results, strict=True) if unit.source == number]
        fields = Counter[str]()
        for _, result in own:
            fields.update({name: n for name, n in result.unread.items() if name not in source.ignore})
        if fields:
            by_source[source.name] = dict(fields)
            place = next(file for file, result in own if result.unread.keys() & fields.keys())
            error = error or unread_error(source, fields, sum(result.rows for _, result in own), place)
    return by_source, error
