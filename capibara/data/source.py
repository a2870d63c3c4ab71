"""Text in: files and folders of .txt, .md, .jsonl and .jsonl.gz as a stream of documents, in bounded memory.

    .txt .md           one document a file; \\r\\n and \\r become \\n, so that a text is the same wherever it was saved
    .jsonl .jsonl.gz   one document a line, an object with a string `text`; what else it has are fields

A byte order mark is dropped. Links are followed, each folder and file is read once, hidden ones are left out.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

from capibara.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz")
PIECE_BYTES = 2**20
"""A longer document is cut into documents of this size, so that memory stays bounded whatever a file holds."""

MOST_JSON_BYTES = 64 * 2**20
"""A line of JSON cannot be cut without being read whole, so there is a limit to it."""

_JSON_LINES = (".jsonl", ".jsonl.gz")


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
    """The text files behind paths, each once; folders are searched through in order, hidden files are left out.

    Raises:
      DataError: If a path does not exist or is no text file, a folder cannot be listed, or nothing is found.
    """
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(p) for p in paths]
    found: list[Path] = []
    others: set[str] = set()
    for path in given:
        if path.is_dir():
            for file in sorted(_files_in(path)):
                if _is_text(file):
                    found.append(file)
                else:
                    others.add(file.suffix or file.name)
        elif not path.exists():
            raise DataError(f"There is no {path}; name a folder or files of text ({', '.join(SUFFIXES)}).")
        elif not _is_text(path):
            raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; convert it, or name another file.")
        elif not path.is_file():
            raise DataError(f"{path} is not a regular file and can be read only once; save it as a file.")
        else:
            found.append(path)
    if not found:
        names = ", ".join(map(str, given)) or "data.path"
        held = f"; it has {', '.join(sorted(others)[:5])}" if others else ""
        raise DataError(f"{names} holds no text: no file ends in {', '.join(SUFFIXES)}{held}. Name another place.")
    once: dict[Path, Path] = {}
    for file in found:
        once.setdefault(file.resolve(), file)
    return list(once.values())


def _file_fields(file: Path) -> dict[str, str]:
    """The fields that every document of a file has; bytes of a name that are no UTF-8 are shown as �."""
    return {key: os.fsencode(name).decode(errors="replace")
            for key, name in (("file", file.name), ("folder", file.absolute().parent.name))}  # fmt: skip


def read_documents(paths: str | Path | Iterable[str | Path]) -> Iterator[Document]:
    """Documents of all files in order; a .txt or .md file is one, each line of a .jsonl file is one.

    Raises:
      DataError: If a file cannot be read or is not UTF-8, or a line is not a JSON object with a string `text`; the
        place is named. Bytes are counted from 0, in a .gz file after unpacking.
    """
    for file in text_files(paths):
        if file.name.lower().endswith(_JSON_LINES):
            yield from _json_lines(file, _file_fields(file))
        else:
            yield from _pieces(_decoded(file), _file_fields(file))


def pieces(text: str, fields: dict[str, str], size: int = PIECE_BYTES, ends: bool = True) -> Iterator[Document]:
    """A text as documents of at most `size` characters; only the last one `ends`, and only if the text does."""
    return _pieces((text[i : i + size] for i in range(0, len(text), size)), fields, size, ends)


def _pieces(
    parts: Iterable[str], fields: dict[str, str], size: int = PIECE_BYTES, ends: bool = True
) -> Iterator[Document]:
    held = ""
    for part in parts:
        held += part
        while len(held) > size:
            yield Document(held[:size], fields, ends=False)
            held = held[size:]
    if held:
        yield Document(held, fields, ends)


def _is_text(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIXES)


def _files_in(folder: Path) -> Iterator[Path]:
    """Shown files at any depth; folders behind links too, each once, so that a loop of links ends."""
    seen = {os.path.realpath(folder)}

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}); mend it or leave it out.") from None

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(root, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        yield from (path for name in files if not name.startswith(".") and (path := Path(root, name)).is_file())


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        with cast(IO[bytes], gzip.open(file, "rb")) if file.suffix.lower() == ".gz" else open(file, "rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a whole gzip file ({error}); pack it again or leave it out.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}); mend it or leave it out.") from None


def _decoded(file: Path) -> Iterator[str]:
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder, end = io.IncrementalNewlineDecoder(utf8, translate=True), 0
    with _opened(file) as stream:
        more = True
        while more:
            chunk = stream.read(PIECE_BYTES)
            more = bool(chunk)
            end += len(chunk)
            try:
                text = decoder.decode(chunk, final=not more)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, end - len(error.object) + error.start) from None
            yield text


def _json_lines(file: Path, fields: dict[str, str]) -> Iterator[Document]:
    with _opened(file) as stream:
        number = start = 0
        while raw := stream.readline(MOST_JSON_BYTES + 1):
            number += 1
            if len(raw) > MOST_JSON_BYTES:
                raise DataError(
                    f"{file} line {number} is longer than {MOST_JSON_BYTES >> 20} MB; a line is one document: "
                    "split it, or save the text as .txt, where any length is fine."
                )
            if raw.strip():
                yield from _json_line(raw, file, number, start, fields)
            start += len(raw)


def _json_line(raw: bytes, file: Path, number: int, start: int, fields: dict[str, str]) -> Iterator[Document]:
    try:
        item = json.loads(raw.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise _not_utf8(file, start + len(raw) - len(error.object) + error.start, number) from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{file} line {number} is not JSON ({reason}); mend or remove the line.") from None
    text = item.get("text") if isinstance(item, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{file} line {number} is not an object with a string "text"; mend or remove the line.')
    own = {k: str(v) for k, v in item.items() if k != "text" and isinstance(v, (str, int, float, bool))}
    try:
        "".join((text, *own, *own.values())).encode()
    except UnicodeEncodeError:
        raise DataError(f"{file} line {number} has half of a \\u surrogate pair; mend or remove the line.") from None
    yield from pieces(text, fields | own)


def _not_utf8(file: Path, place: int, line: int | None = None) -> DataError:
    where = f"at byte {place}" if line is None else f"at byte {place} (line {line})"
    return DataError(f"{file} is not UTF-8 {where}; save it as UTF-8 or leave it out.")
