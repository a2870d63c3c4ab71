"""Headers: what the reference library writes is read; whatever is not one whole file is refused with the reason."""

from __future__ import annotations

import json

import numpy as np
import pytest
from disk_models import BF16, random_model, write_model
from hypothesis import given
from hypothesis import strategies as st

from capibara.errors import DataError
from capibara.merge.header import build_header, parse_header, read_header


def header_file(path, content, data=b"", *, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_offsets_are_those_of_the_reference_library(tmp_path):
    tensors = random_model(0) | {"h": np.arange(5, dtype=np.float16), "b": np.ones(3, BF16), "i": np.arange(4)}
    path = write_model(tmp_path / "x.safetensors", tensors)
    header, raw = read_header(path), path.read_bytes()
    assert header.entries.keys() == tensors.keys()
    for name, found in header.entries.items():
        assert raw[found.offset : found.offset + found.size] == tensors[name].tobytes()
        assert found.shape == tensors[name].shape


SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "I64"]), SHAPES), max_size=6))
def test_a_header_that_is_built_is_read_back(tensors):
    from pathlib import Path

    named = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    raw, entries = build_header(named, {"format": "pt"})
    total = len(raw) + sum(one.size for one in entries.values())
    assert len(raw) % 8 == 0
    found = parse_header(raw[8:], total, Path("x"))
    assert found.entries == entries and found.metadata == {"format": "pt"}


BAD = {
    "7 bytes": (b"\0" * 7, "the length of the header alone takes 8"),
    "no JSON": ((5).to_bytes(8, "little") + b"{oops", "its header is not JSON"),
    "nested too deep": ((200000).to_bytes(8, "little") + b"[" * 200000, "its header is not JSON"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    "10 TB": ((10**13).to_bytes(8, "little") + b"{}", "claims 10,000,000,000,000 bytes; 2 are left"),
    "2^63": ((2**63).to_bytes(8, "little") + b"{}", "are left in the file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, name):
    raw, reason = BAD[name]
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(DataError, match="not a whole safetensors file") as caught:
        read_header(tmp_path / "x")
    assert reason in str(caught.value)


LIES = {
    "truncated": ({"a": entry(0, 16)}, 12, "tensor 'a' ends at byte"),
    "10 TB of data": ({"a": entry(0, 10**13)}, 16, "truncated"),
    "overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, 24, "tensors 'a' and 'b' overlap"),
    "the same range twice": ({"a": entry(0, 16), "b": entry(0, 16)}, 16, "overlap"),
    "gap": ({"a": entry(0, 8), "b": entry(16, 24)}, 24, "8 bytes before tensor 'b' belong to no tensor"),
    "bytes at the end": ({"a": entry(0, 8)}, 12, "4 bytes at its end belong to no tensor"),
    "backwards": ({"a": entry(8, 0, shape=[0])}, 8, "ends at 0, before it begins at 8"),
    "wrong size": ({"a": entry(0, 16, shape=[5])}, 16, "needs 20 bytes; 16 are given"),
    "shape overflow": ({"a": entry(0, 16, shape=[2**40, 2**40])}, 16, "needs 4,835,703,278,458,516,698,824,704 bytes"),
    "unknown dtype": ({"a": entry(0, 16, dtype="F31")}, 16, "unknown dtype 'F31'"),
    "dtype no name": ({"a": entry(0, 16, dtype=3)}, 16, "unknown dtype 3"),
    "negative side": ({"a": entry(0, 16, shape=[-4])}, 16, "no list of numbers of 0 or more"),
    "side no whole number": ({"a": entry(0, 16, shape=[4.0])}, 16, "no list of numbers of 0 or more"),
    "an offset that is false": ({"a": entry(0, 0) | {"data_offsets": [False, 0]}}, 0, "no pair of numbers"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "no pair of numbers"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "lacks dtype, shape or data_offsets"),
    "an entry that is a list": ({"a": [1]}, 4, "lacks dtype, shape or data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "not an object of strings"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(tmp_path, name):
    content, size, reason = LIES[name]
    with pytest.raises(DataError) as caught:
        read_header(header_file(tmp_path / "x", content, b"\0" * size))
    assert reason in str(caught.value)


def test_a_name_given_twice_is_refused(tmp_path):
    one = json.dumps(entry(0, 4))
    text = f'{{"a":{one},"a":{one}}}'.encode()
    with pytest.raises(DataError, match="names 'a' twice"):
        read_header(header_file(tmp_path / "x", text, b"\0" * 4))


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_parse_or_be_refused(raw):
    import tempfile
    from pathlib import Path

    with tempfile.NamedTemporaryFile() as file:
        file.write(raw)
        file.flush()
        try:
            read_header(Path(file.name))
        except DataError:
            pass


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write_model(tmp_path / "x.safetensors", random_model(0)).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read_header(tmp_path / "cut")
