"""Ids back to text, for people to read."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from data_prep.encoders import TextTokenizer
from sdlm_megatron.data.sentencepiece_model import read_pieces
from sdlm_megatron.data.tokenizer_identity import added_tokens, sentencepiece_file
from sdlm_megatron.errors import DataError

TokenText = Callable[[Sequence[int]], list[str]]
"""Ids -> one string for each; joined they are the text. Of a character made of several tokens, all but the last give an
empty string."""


def open_text(folder: str | Path) -> TokenText:
    """The text of a tokenizer's tokens; an id that it lacks is shown as `<id 7>`.

    Args:
        folder: the tokenizer's folder, or a SentencePiece `.model` file.

    Raises DataError when there is no tokenizer, or it cannot be read.
    """
    try:
        backend = _of_pieces(folder) if sentencepiece_file(folder) else _of_definition(folder)
    except ValueError as error:
        raise DataError(f"the tokenizer cannot be read: {error}", str(folder), "name another one") from error
    return lambda ids: _texts(backend, ids)


def show_ids(ids: Sequence[int]) -> list[str]:
    """`TokenText` for want of a tokenizer: the numbers."""
    return [f"{int(i)} " for i in ids]


def _of_definition(folder: str | Path) -> Tokenizer:
    return Tokenizer.from_str(TextTokenizer.from_folder(folder).definition)


def _of_pieces(source: str | Path) -> Tokenizer:
    """A tokenizer that can only decode, from the pieces of a SentencePiece model."""
    path = sentencepiece_file(source)
    assert path is not None
    vocabulary = {piece.text: i for i, piece in enumerate(read_pieces(path.read_bytes()))}
    backend = Tokenizer(models.WordLevel({**vocabulary, **added_tokens(source)}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _texts(backend: Tokenizer, ids: Sequence[int]) -> list[str]:
    texts, stream, open_since = [], decoders.DecodeStream(skip_special_tokens=False), 0
    for n, i in enumerate(map(int, ids)):
        known = i >= 0 and backend.id_to_token(i) is not None
        text = stream.step(backend, i) if known else f"<id {i}>"
        texts.append(text or "")
        if text or not known:
            open_since = n + 1
        if not known:
            stream = decoders.DecodeStream(skip_special_tokens=False)
    if open_since < len(texts):  # the last character is not complete
        texts[-1] = backend.decode([int(i) for i in ids[open_since:]], skip_special_tokens=False)
    return texts
