"""Text in: files and folders of .txt, .md, .jsonl and .jsonl.gz as a stream of documents, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capibara.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz")
PIECE_BYTES = 2**20
"""A longer document is cut into documents of this size, so that memory stays bounded whatever a file holds."""

MOST_JSON_BYTES = 64 * 2**20


class Document(NamedTuple):
    """A text and what is known of it.

    Attributes:
      text: At most 1 MB.
      fields: Names to values; `file` and `folder` are always there.
      ends: False where the text goes on in the next document, because it was cut.
    """

    text: str
    fields: dict[str, str]
    ends: bool = True


def text_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The text files behind paths, sorted; folders are searched through.

    Raises:
      DataError: If a path does not exist, is no text file, or nothing is found.
    """
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(p) for p in paths]
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.endswith(SUFFIXES)]
        elif not path.exists():
            raise DataError(f"There is no {path}; data.path names a folder or files of text ({', '.join(SUFFIXES)}).")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; convert it, or name another file.")
        else:
            found.append(path)
    if not found:
        names = ", ".join(map(str, given))
        raise DataError(f"{names} holds no text: no file ends in {', '.join(SUFFIXES)}. Put your text there.")
    return found


def read_documents(paths: str | Path | Iterable[str | Path]) -> Iterator[Document]:
    """Documents of all files in order; a .txt or .md file is one, each line of a .jsonl file is one.

    Raises:
      DataError: If a file is not UTF-8, or a line is not a JSON object with a string `text`; the place is named.
    """
    for file in text_files(paths):
        fields = {"file": file.name, "folder": file.parent.name}
        if ".jsonl" in file.name:
            yield from _json_lines(file, fields)
        else:
            yield from _pieces(_decoded(file), fields)


def pieces(text: str, fields: dict[str, str], size: int = PIECE_BYTES) -> Iterator[Document]:
    """A text as documents of at most `size` characters; only the last one `ends`."""
    return _pieces((text[i : i + size] for i in range(0, len(text), size)), fields, size)


def _pieces(parts: Iterable[str], fields: dict[str, str], size: int = PIECE_BYTES) -> Iterator[Document]:
    held = ""
    for part in parts:
        held += part
        while len(held) > size:
            yield Document(held[:size], fields, ends=False)
            held = held[size:]
    if held:
        yield Document(held, fields)


def _decoded(file: Path) -> Iterator[str]:
    decoder, offset = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with open(file, "rb") as stream:
        while chunk := stream.read(PIECE_BYTES):
            yield _decode(decoder, chunk, file, offset)
            offset += len(chunk)
        yield _decode(decoder, b"", file, offset, final=True)


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, file: Path, offset: int, final: bool = False) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        place = offset - pending + error.start
        raise DataError(f"{file} is not UTF-8 at byte {place}; save it as UTF-8 or leave it out.") from None


def _json_lines(file: Path, fields: dict[str, str]) -> Iterator[Document]:
    opened: Any = gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")
    try:
        with opened as stream:
            number = 0
            while raw := stream.readline(MOST_JSON_BYTES + 1):
                number += 1
                if len(raw) > MOST_JSON_BYTES:
                    raise DataError(
                        f"{file} line {number} is longer than {MOST_JSON_BYTES >> 20} MB; a line is one document: split it, "
                        "or save the text as .txt, where any length is fine."
                    )
                if raw.strip():
                    yield from _json_line(raw, file, number, fields)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{file} is not a whole gzip file ({error}).") from None


def _json_line(raw: bytes, file: Path, number: int, fields: dict[str, str]) -> Iterator[Document]:
    try:
        item = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} line {number} is not UTF-8 (byte {error.start} of the line).") from None
    except ValueError as error:
        raise DataError(f"{file} line {number} is not JSON ({error}).") from None
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise DataError(f'{file} line {number} is not an object with a string "text".')
    own = {k: str(v) for k, v in item.items() if k != "text" and isinstance(v, (str, int, float, bool))}
    yield from pieces(item["text"], fields | own)
