"""Certificates: one text per value, a chain that shows every change, and digests of trees."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.consensus.certificate import (
    GENESIS,
    canonical,
    check_link,
    digest_leaf,
    digest_rows,
    digest_tree,
    line_hash,
    parse_line,
    seal,
)
from capibara.errors import CertificateError
from capibara.files import read_tensors, tensors_to_bytes

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
LINE = {
    "round": 7,
    "nodes": [{"id": 0, "norm": 0.1, "reason": "backed"}, {"id": 1, "norm": float("nan"), "reason": "not_finite"}],
    "tau": 1e-07,
    "größe": -0.0,
    "timing": {"train_s": 1.5},
}
GOLDEN = (
    '{"größe":0.0,"hash":"6e48ce488309b03324dd140f99ab72b82aecdcfaab59085f9a9a6aaf6d119688",'
    '"nodes":[{"id":0,"norm":0.1,"reason":"backed"},{"id":1,"norm":null,"reason":"not_finite"}],'
    f'"previous":"{GENESIS}","round":7,"tau":1e-07,"timing":{{"train_s":1.5}}}}'
)


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_canonical_text_reads_back_as_the_value_and_is_its_only_text(value):
    text = canonical(value)
    again = json.loads(text)
    assert again == value
    assert canonical(again) == text


@given(st.dictionaries(TEXT, NUMBERS, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_order_of_keys_does_not_matter(values, random):
    names = list(values)
    random.shuffle(names)
    assert canonical({name: values[name] for name in names}) == canonical(values)
    assert list(json.loads(canonical(values))) == sorted(values)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=100, deadline=None)
def test_floats_are_the_shortest_text_that_reads_back(number):
    text = canonical(number).decode()
    assert float(text) == number
    digits = text.lstrip("-").split("e")[0].replace(".", "").strip("0")
    fewest = next(p for p in range(1, 18) if float(f"{number:.{p - 1}e}") == number)
    assert len(digits) == (fewest if number else 0)
    assert any(mark in text for mark in ".e"), "a float must not read back as an int"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (np.float32(0.1), "0.10000000149011612"),
        (1e22, "1e+22"),
        (1.0, "1.0"),
        (1, "1"),
        (np.int64(1), "1"),
        (-0.0, "0.0"),
        (math.nan, "null"),
        (-math.inf, "null"),
        (np.bool_(True), "true"),
        (np.float32([1, math.nan]), "[1.0,null]"),
        (np.array(2.5), "2.5"),
        ((), "[]"),
        ("é\n\x7f", '"é\\n\x7f"'),
        ({"b": 1, "a": {"d": 2, "c": 3}}, '{"a":{"c":3,"d":2},"b":1}'),
    ],
)
def test_canonical_text_of(value, text):
    assert canonical(value).decode() == text


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), 1j, "\ud800"])
def test_what_has_no_canonical_text_is_refused(value):
    with pytest.raises(CertificateError):
        canonical({"field": value})


def test_golden_line():
    """The format is fixed: a changed byte here breaks every chain that was ever written."""
    assert canonical(seal(LINE, GENESIS)).decode() == GOLDEN
    assert parse_line(GOLDEN.encode(), 1) == json.loads(GOLDEN)


def test_hash_is_blake3_of_the_line_without_hash_timing_and_environment():
    sealed = seal(LINE, GENESIS)
    inside = {key: value for key, value in sealed.items() if key not in ("hash", "timing", "environment")}
    assert sealed["hash"] == blake3(canonical(inside)).hexdigest()
    assert line_hash(sealed | {"timing": 1, "environment": 2}) == sealed["hash"]
    assert line_hash(sealed | {"round": 8}) != sealed["hash"]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_changed_byte_inside_the_hash_is_named(data):
    text = bytearray(GOLDEN.encode())
    timing = range(GOLDEN.encode().index(b'"timing"'), len(text))
    place = data.draw(st.integers(0, len(text) - 1).filter(lambda i: i not in timing))
    text[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != text[place]))
    with pytest.raises(CertificateError, match=r"rounds\.jsonl line 3"):
        parse_line(bytes(text), 3)


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b"nonsense", b"\xff", b"[" * 100_000, b'{"hash":1,"previous":2}', b"9" * 5000,
     b'{"a":NaN,"hash":"x","previous":"y"}', b'{"a":"\\ud800","hash":"x","previous":"y"}',
     b'{"a":1,"a":1,"hash":"x","previous":"y"}', b'{"hash":"x", "previous":"y"}'],
)  # fmt: skip
def test_what_is_no_canonical_line_is_named(raw):
    with pytest.raises(CertificateError, match=r"rounds\.jsonl line 2"):
        parse_line(raw, 2)


def test_a_line_that_does_not_follow_is_named():
    first = seal(LINE, GENESIS)
    check_link(seal(LINE, first["hash"]), first["hash"], 2)
    with pytest.raises(CertificateError, match=r"line 2 does not follow"):
        check_link(seal(LINE, GENESIS), first["hash"], 2)


def tree() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "b.w": generator.standard_normal((3, 4)).astype(np.float32),
        "a": generator.integers(0, 9, (5,)).astype(np.int32),
        "scalar": np.float32(2),
        "empty": np.zeros((0, 2), np.float32),
    }


def test_leaf_digest_is_blake3_of_path_dtype_shape_and_bytes():
    leaf = tree()["b.w"]
    assert digest_leaf("b.w", leaf) == blake3(b"b.w\0float32\x003,4\0" + leaf.astype("<f4").tobytes()).digest()


def test_tree_digest_is_blake3_of_the_leaf_digests_in_order_of_their_names():
    whole, parts = digest_tree(tree())
    assert whole == blake3(b"".join(bytes.fromhex(parts[name]) for name in sorted(parts))).hexdigest()
    assert digest_tree(dict(reversed(tree().items())))[0] == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"a": t["a"].astype(np.int64)},
        lambda t: t | {"b.w": t["b.w"].reshape(4, 3)},
        lambda t: t | {"b.w": t["b.w"].T},
        lambda t: {**{k: v for k, v in t.items() if k != "a"}, "c": t["a"]},
        lambda t: t | {"b.w": np.where(np.arange(4) == 2, np.nextafter(t["b.w"], 9), t["b.w"]).astype(np.float32)},
        lambda t: {k: v for k, v in t.items() if k != "empty"},
        lambda t: t | {"scalar": t["scalar"].reshape(1)},
        lambda t: t | {"scalar": np.float32(-0.0) + 2 + np.float32(1e-6)},
    ],
)
def test_any_change_of_a_tree_changes_its_digest(change):
    assert digest_tree(change(tree()))[0] != digest_tree(tree())[0]


def test_memory_layout_does_not_change_a_digest():
    there = tree()
    other = {name: np.array(leaf, leaf.dtype.newbyteorder(">"), order="F") for name, leaf in there.items()}
    other["b.w"] = np.repeat(there["b.w"], 2, axis=1)[:, ::2]
    assert digest_tree(other)[0] == digest_tree(there)[0]


def test_jax_arrays_and_bfloat16_have_the_digest_of_their_bytes():
    import jax.numpy as jnp

    leaf = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    assert digest_leaf("x", leaf) == blake3(b"x\0bfloat16\x002,3\0" + np.asarray(leaf).tobytes()).digest()
    nested = {"a": {"b": jnp.ones(2)}, "c": [jnp.zeros(1)]}
    assert digest_tree(nested) == digest_tree({"a.b": np.ones(2, np.float32), "c.0": np.zeros(1, np.float32)})


@pytest.mark.parametrize("threads", [1, 3, None])
def test_digests_of_rows_are_those_of_each_row_alone(threads):
    generator = np.random.default_rng(1)
    stack = {"w": generator.standard_normal((4, 3, 2)).astype(np.float32), "s": np.arange(4, dtype=np.float32)}
    alone = [digest_tree({name: leaf[i] for name, leaf in stack.items()})[0] for i in range(4)]
    assert digest_rows(stack, 4, threads=threads) == alone
    assert len(set(alone)) == 4


def test_safetensors_give_back_every_type_and_shape(tmp_path):
    import ml_dtypes

    tensors = tree() | {"half": np.arange(3).astype(ml_dtypes.bfloat16), "row": np.arange(6.0).reshape(2, 3).T}
    (tmp_path / "t.safetensors").write_bytes(tensors_to_bytes(tensors))
    again = read_tensors(tmp_path / "t.safetensors")
    assert digest_tree(again) == digest_tree({name: np.asarray(leaf) for name, leaf in tensors.items()})
