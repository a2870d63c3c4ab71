"""Text in: each document once, whole, in order; what cannot be read is named with its place."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara.data.source import MOST_JSON_BYTES, PIECE_BYTES, Document, pieces, read_documents, text_files
from capibara.errors import DataError

READING = """
import sys
from capibara.data.source import read_documents
count = sum(len(document.text) for document in read_documents(sys.argv[1]))
"""

PREPARING = """
import sys
from pathlib import Path
from capibara.core.tokenizer import byte_tokenizer
from capibara.data.prepare import check_shards, prepare
from capibara.data.source import read_documents
path = Path(sys.argv[1])
manifest = prepare(lambda: read_documents(path), byte_tokenizer(), path.with_name("shards"), held_out_fraction=0.0)
check_shards(path.with_name("shards"), manifest)
count = manifest["splits"]["train"]["tokens"]
"""

PEAK = """
print(count, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"""Not `ru_maxrss`, which begins with the memory of the process that started this one."""


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)]


def test_every_kind_of_file_is_read_in_the_order_of_names(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("third", "fourth"))
    write(tmp_path / "a.txt", "first\n")
    write(tmp_path / "b" / "x.md", "# second")
    write(tmp_path / "c.jsonl", lines)
    write(tmp_path / "d.jsonl.gz", gzip.compress(lines.replace("third", "fifth").replace("fourth", "sixth").encode()))
    write(tmp_path / "E.TXT", "capitals")
    assert texts(tmp_path) == ["capitals", "first\n", "# second", "third", "fourth", "fifth", "sixth"]


def test_the_kind_of_a_file_is_its_end_not_its_middle(tmp_path):
    write(tmp_path / "about.jsonl.txt", "not JSON")
    assert texts(tmp_path) == ["not JSON"]


def test_a_document_knows_its_file_its_folder_and_its_fields(tmp_path):
    write(tmp_path / "law" / "a.jsonl", json.dumps({"text": "t", "year": 1999, "ok": True, "tags": ["x"], "who": "J"}))
    write(tmp_path / "law" / "b.txt", "u")
    first, second = read_documents(tmp_path)
    assert first == Document("t", {"file": "a.jsonl", "folder": "law", "year": "1999", "ok": "True", "who": "J"})
    assert second == Document("u", {"file": "b.txt", "folder": "law"})


def test_a_folder_is_known_by_its_name_also_where_it_is_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "law" / "b.txt", "u")
    monkeypatch.chdir(tmp_path / "law")
    for path in (".", "b.txt"):
        assert [d.fields["folder"] for d in read_documents(path)] == ["law"]


def test_a_file_named_twice_is_read_once(tmp_path):
    file = write(tmp_path / "a.txt", "once")
    (tmp_path / "link.txt").symlink_to(file)
    assert [d.text for d in read_documents([tmp_path, file, str(file)])] == ["once"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path / "seen.txt", "seen")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "deep" / "a.txt", "no")
    assert texts(tmp_path) == ["seen"]
    assert texts(tmp_path / ".git") == ["no"], "a hidden folder that is named is meant"


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path):
    write(tmp_path / "text" / "sub" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    text = tmp_path / "text"
    (text / "linked").symlink_to(tmp_path / "elsewhere")
    (text / "sub" / "up").symlink_to(text)
    (text / "self").symlink_to(text / "self")
    (text / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert sorted(texts(text)) == ["a", "b"]


def test_what_holds_no_text_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "papers" / "a.pdf", "%PDF")
    write(tmp_path / "papers" / "deep" / "b.docx", "PK")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, words in (
        ("empty", r"empty holds no text: no file ends in \.txt, \.md, \.jsonl, \.jsonl\.gz\. Name another place"),
        ("papers", r"papers holds no text.*; it has \.docx, \.pdf\."),
        ("papers/a.pdf", r"a\.pdf is none of \.txt"),
        ("missing", "There is no .*missing"),
        ("pipe.txt", "pipe.txt is not a regular file"),
    ):
        with pytest.raises(DataError, match=words):
            text_files(tmp_path / name)


def test_an_empty_file_is_no_document(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "\ufeff")
    write(tmp_path / "c.jsonl", "\n\r\n  \n" + json.dumps({"text": ""}))
    assert texts(tmp_path) == []


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_is_the_same_wherever_it_was_saved(tmp_path, name):
    """Windows and old Mac line ends, and a byte order mark, are marks of the editor, not of the text."""
    write(tmp_path / "unix" / name, "one\ntwo\n\nthree")
    write(tmp_path / "windows" / name, "\ufeffone\r\ntwo\r\n\r\nthree")
    write(tmp_path / "mac" / name, "one\rtwo\r\rthree")
    assert texts(tmp_path / "unix") == texts(tmp_path / "windows") == texts(tmp_path / "mac") == ["one\ntwo\n\nthree"]


def test_a_line_end_across_two_reads_is_one(tmp_path):
    write(tmp_path / "a.txt", b"x" * (PIECE_BYTES - 1) + b"\r\n" + b"y")
    assert "".join(texts(tmp_path)) == "x" * (PIECE_BYTES - 1) + "\ny"


def test_json_lines_may_end_as_on_windows_and_begin_with_a_byte_order_mark(tmp_path):
    write(tmp_path / "a.jsonl", '\ufeff{"text": "one\\r\\n"}\r\n{"text": "two"}\r\n')
    assert texts(tmp_path) == ["one\r\n", "two"], "what a line spells out is meant"


@given(st.text(), st.integers(1, 8))
def test_pieces_join_to_the_text_and_only_the_last_ends(text: str, size: int):
    parts = list(pieces(text, {}, size))
    assert "".join(p.text for p in parts) == text
    assert [p.ends for p in parts] == [False] * (len(parts) - 1) + [True] * bool(text)
    assert all(len(p.text) == size for p in parts[:-1]) and all(1 <= len(p.text) <= size for p in parts)


def test_a_long_file_is_cut_where_characters_begin(tmp_path):
    """Two-byte characters at an odd offset: every read of 1 MB ends in the middle of one."""
    text = "a" + "é" * PIECE_BYTES + "b"
    write(tmp_path / "a.txt", text)
    documents = list(read_documents(tmp_path))
    assert "".join(d.text for d in documents) == text
    assert [(len(d.text), d.ends) for d in documents] == [(PIECE_BYTES, False), (2, True)]


@pytest.mark.parametrize("place", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 5])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_that_is_not_utf8_is_named(tmp_path, place, mark):
    """Oracle: the place it was put, a byte order mark included."""
    file = write(tmp_path / "bad.txt", mark + b"\n" * place + b"\xff" + b"tail" * 9)
    with pytest.raises(DataError, match=rf"bad\.txt is not UTF-8 at byte {place + len(mark)}; save it as UTF-8"):
        texts(file)


def test_a_character_cut_off_by_the_end_of_the_file_is_named(tmp_path):
    with pytest.raises(DataError, match="not UTF-8 at byte 3;"):
        texts(write(tmp_path / "a.txt", b"abc\xe2\x82"))


def test_a_json_line_that_is_not_utf8_is_named_by_byte_and_line(tmp_path):
    first = b'{"text": "good"}\n'
    file = write(tmp_path / "a.jsonl", first + b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl is not UTF-8 at byte {len(first) + 10} \(line 2\)"):
        texts(file)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', r"line 3 is not JSON \(Unterminated string starting at, column 10\)"),
        ("plain words", r"line 3 is not JSON \(Expecting value, column 1\)"),
        ("[" * 100_000, "line 3 is not JSON"),
        ('{"body": "x"}', 'line 3 is not an object with a string "text"'),
        ('{"text": 5}', 'line 3 is not an object with a string "text"'),
        ('["text"]', 'line 3 is not an object with a string "text"'),
        ("null", 'line 3 is not an object with a string "text"'),
        ('{"text": "\\ud800"}', "line 3 has half of a"),
        ('{"text": "x", "who": "\\udfff"}', "line 3 has half of a"),
    ],
)
def test_a_json_line_that_cannot_be_used_is_named(tmp_path, line, words):
    """Blank lines count: the number is that which an editor shows."""
    content = f'{{"text": "good"}}\n\n{line}\n'
    file = write(tmp_path / "a.jsonl", content)
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(content.encode()))
    for bad in (file, packed):
        with pytest.raises(DataError, match=f"{bad.name} {words}"):
            texts(bad)


def test_a_gzip_file_that_is_not_whole_is_refused_wherever_it_is_cut(tmp_path):
    rng = random.Random(0)
    content = "".join(json.dumps({"text": str(rng.random())}) + "\n" for _ in range(200)).encode()
    packed = gzip.compress(content, mtime=0)
    for size in range(1, len(packed), 97):
        file = write(tmp_path / "a.jsonl.gz", packed[:size])
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a whole gzip file"):
            texts(file)
    assert len(texts(write(tmp_path / "a.jsonl.gz", packed))) == 200


def test_a_flipped_byte_in_a_gzip_file_is_noticed(tmp_path):
    packed = bytearray(gzip.compress(json.dumps({"text": "abc" * 999}).encode(), mtime=0))
    packed[-6] ^= 1  # of the check sum
    with pytest.raises(DataError, match="not a whole gzip file"):
        texts(write(tmp_path / "a.jsonl.gz", bytes(packed)))
    with pytest.raises(DataError, match="not a whole gzip file"):
        texts(write(tmp_path / "b.jsonl.gz", b'{"text": "never packed"}'))


def test_a_name_that_is_not_utf8_is_no_obstacle(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        with open(path, "wb") as file:
            file.write(b"text")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    (document,) = read_documents(tmp_path)
    assert document.fields["file"] == "caf\ufffd.txt"


def peak_of(code: str, path: Path, limit: int | None = None) -> tuple[int, int]:
    """What a process prints of a file, and its largest memory in kB, as Linux tells it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells a process its largest memory")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))" if limit else ""
    done = subprocess.run([sys.executable, "-c", limited + code + PEAK, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, peak = map(int, done.stdout.split())
    return count, peak


@pytest.fixture
def line_of_1_gb(tmp_path: Path) -> Path:
    """A sparse file of NULs, valid UTF-8 without a line end."""
    with open(tmp_path / "line.txt", "wb") as stream:
        stream.truncate(2**30)
    return tmp_path / "line.txt"


@pytest.mark.slow
def test_a_line_of_1_gb_is_read_in_bounded_memory(line_of_1_gb):
    """300 MB of address space, Python's own included."""
    characters, peak = peak_of(READING, line_of_1_gb, limit=300 * 2**20)
    assert characters == 2**30
    assert peak < 150 * 1024


@pytest.mark.slow
def test_a_line_of_1_gb_is_prepared_in_bounded_memory(line_of_1_gb):
    """Digests of input and shards included; 2 GB of ids go to disk."""
    tokens, peak = peak_of(PREPARING, line_of_1_gb)
    shutil.rmtree(line_of_1_gb.with_name("shards"))
    assert tokens == 2**30 + 1
    assert peak < 250 * 1024


def test_a_json_line_of_1_gb_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "line.jsonl"
    with open(file, "wb") as stream:
        stream.write(b'{"text": "fine"}\n')
        stream.truncate(2**30)
    documents = read_documents(file)
    assert next(documents).text == "fine"
    with pytest.raises(DataError, match=r"line\.jsonl line 2 is longer than 64 MB; a line is one document: split it"):
        next(documents)


def test_a_json_line_of_the_largest_size_is_read(tmp_path):
    frame = b'{"text": ""}\n'
    line = frame[:10] + b"x" * (MOST_JSON_BYTES - len(frame)) + frame[10:]
    assert len(line) == MOST_JSON_BYTES
    assert sum(map(len, texts(write(tmp_path / "a.jsonl", line)))) == MOST_JSON_BYTES - len(frame)
    with pytest.raises(DataError, match="line 1 is longer than 64 MB"):
        texts(write(tmp_path / "a.jsonl", b" " + line))
