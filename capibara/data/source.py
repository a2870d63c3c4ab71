"""Text in: files and folders of .txt, .md, .jsonl and .jsonl.gz as a stream of documents, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import json
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
      DataError: If a path does not exist, is no text file, or nothing is found.
    """
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(p) for p in paths]
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += [p for p in sorted(path.rglob("*")) if p.name.endswith(SUFFIXES) and _is_shown(p, path)]
        elif not path.exists():
            raise DataError(f"There is no {path}; data.path names a folder or files of text ({', '.join(SUFFIXES)}).")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; convert it, or name another file.")
        else:
            found.append(path)
    if not found:
        names = ", ".join(map(str, given))
        raise DataError(f"{names} holds no text: no file ends in {', '.join(SUFFIXES)}. Put your text there.")
    once: dict[Path, Path] = {}
    for file in found:
        once.setdefault(file.resolve(), file)
    return list(once.values())


def read_documents(paths: str | Path | Iterable[str | Path]) -> Iterator[Document]:
    """Documents of all files in order; a .txt or .md file is one, each line of a .jsonl file is one.

    Raises:
      DataError: If a file cannot be read or is not UTF-8, or a line is not a JSON object with a string `text`; the
        place is named. Bytes are counted from 0, in a .gz file after unpacking.
    """
    for file in text_files(paths):
        fields = {"file": file.name, "folder": file.parent.name}
        if ".jsonl" in file.name:
            yield from _json_lines(file, fields)
        else:
            yield from _pieces(_decoded(file), fields)


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


def _is_shown(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        with cast(IO[bytes], gzip.open(file, "rb")) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a whole gzip file ({error}); pack it again or leave it out.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}); mend it or leave it out.") from None


def _decoded(file: Path) -> Iterator[str]:
    decoder, end = codecs.getincrementaldecoder("utf-8-sig")(), 0
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
        item = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(file, start + len(raw) - len(error.object) + error.start, number) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} line {number} is not JSON ({error}); mend or remove the line.") from None
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
