"""The first rows of each source, read before a build starts: their format, and fields that would be lost."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from data_prep.build_config import SourceConfig
from data_prep.documents import UnitResult
from data_prep.forms import FormReader, InputRow, detect_format
from data_prep.readers import InputUnit, plan_units, read_unit, where
from sdlm_megatron.errors import DataError

# Rows that show the format, and rows of which every field is checked: both take well under a second per source.
DETECTED, CHECKED = 100, 1000


def first_rows(source: SourceConfig, most: int) -> Iterator[tuple[InputUnit, InputRow]]:
    """Up to `most` rows from the starts of a source's files, in equal shares, with the units that contain them."""
    units = [unit for unit in plan_units([source]) if not unit.start]
    share = -(-most // max(1, len(units)))
    for unit in units[:most]:
        for row in islice(read_unit(unit, source), share):
            yield unit, row


def with_formats(sources: list[SourceConfig]) -> list[SourceConfig]:
    """The sources with the detected format where none is set; raises DataError where not exactly one matches."""
    return [source if source.format else replace(source, format=detect_source_format(source)) for source in sources]


def detect_source_format(source: SourceConfig) -> str:
    """The format that the first rows of a source match; raises DataError if not exactly one does."""
    rows = ((where(unit, row.place, 0), row.content) for unit, row in first_rows(source, DETECTED))
    return detect_format(rows, source)


def check_fields(sources: list[SourceConfig], system_prompt: str | None) -> None:
    """Raises DataError if the first rows of a source have fields that hold something and are neither read nor ignored,
    and ConfigError if its columns contradict its format."""
    for source in sources:
        reader, places = FormReader(source, system_prompt), dict[str, str]()
        n_rows = 0
        for unit, row in first_rows(source, CHECKED):
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
    fix = f"{source.option('ignore', sorted(unread))} leaves them out"
    if columns := [name for name in unread if "." not in name]:
        named = source.option("columns", {"NAME": columns[0]})
        fix += f"; {named} reads one (NAME: input, system, history, tools, weight)"
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
