"""Which part of the text is held out, and which node gets which documents. Hashes and counts only; no text is kept."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from capibara.errors import ConfigError, DataError, unknown_name

HELD_OUT = ("gate", "merge", "final_gate", "test")
SPLITS = ("train", *HELD_OUT)


def split_of(text: str, held_out_fraction: float) -> str:
    """The split of a document, by its hash alone: equal texts always fall into the same split."""
    share = int.from_bytes(blake3(text.encode()).digest()[:8], "little") / 2**64
    if share >= held_out_fraction:
        return "train"
    return HELD_OUT[min(int(share / held_out_fraction * len(HELD_OUT)), len(HELD_OUT) - 1)]


def deal(how: str, num_nodes: int, sizes: np.ndarray, values: list[str] | None, seed: int) -> list[np.ndarray]:
    """The training documents of each node.

    Args:
      how: `iid`, `by_field` or `dirichlet:γ`.
      num_nodes: n.
      sizes: int64[documents], tokens of each.
      values: The field's value of each document; None where there is no field.
      seed: Of `iid` and `dirichlet`.

    Returns:
      n sorted arrays of document numbers that share out all documents; none is empty.

    Raises:
      ConfigError: If `how` is no such name, or γ no positive number.
      DataError: If there is not a document (or a value of the field) for every node.
    """
    name, _, gamma = how.partition(":")
    if name not in ("iid", "by_field", "dirichlet"):
        raise ConfigError(unknown_name("split", how, ("iid", "by_field", "dirichlet:GAMMA")))
    if len(sizes) < num_nodes:
        raise DataError(
            f"{len(sizes)} training documents cannot be dealt to {num_nodes} nodes. Use fewer nodes or more text."
        )
    if name == "by_field":
        owner = _by_value(num_nodes, sizes, values)
    elif name == "dirichlet":
        owner = _dirichlet(num_nodes, sizes, values, _positive(gamma, how), seed)
    else:
        owner = np.empty(len(sizes), np.int64)
        owner[np.random.default_rng([seed, 1]).permutation(len(sizes))] = np.arange(len(sizes)) % num_nodes
    return [np.flatnonzero(owner == node) for node in range(num_nodes)]


def _by_value(num_nodes: int, sizes: np.ndarray, values: list[str] | None) -> np.ndarray:
    if values is None:
        raise DataError("split = 'by_field' needs data.field, the field by which documents are dealt.")
    names, codes = np.unique(np.array(values), return_inverse=True)
    if len(names) < num_nodes:
        raise DataError(
            f"data.field has {len(names)} different values and there are {num_nodes} nodes; each node needs one. Use "
            "fewer nodes, another field, or split = 'dirichlet:0.33'."
        )
    totals = np.bincount(codes, weights=sizes)
    load, owner = np.zeros(num_nodes), np.empty(len(names), np.int64)
    for code in np.argsort(-totals, kind="stable"):
        owner[code] = np.argmin(load)
        load[owner[code]] += totals[code]
    return owner[codes]


def _positive(gamma: str, how: str) -> float:
    try:
        value = float(gamma)
    except ValueError:
        value = 0.0
    if not 0 < value < np.inf:
        raise ConfigError(f"split = {how!r} needs a positive number, e.g. 'dirichlet:0.33'.")
    return min(value, 1e9)  # equal shares to rounding; far above it the drawing overflows


def _dirichlet(num_nodes: int, sizes: np.ndarray, values: list[str] | None, gamma: float, seed: int) -> np.ndarray:
    """Every value's documents are dealt in shares drawn from Dir(γ, …, γ); without a field, stretches of the text."""
    if values is None:
        groups = min(4 * num_nodes, len(sizes))
        codes = np.minimum(np.cumsum(sizes) * groups // (sizes.sum() + 1), groups - 1)
    else:
        codes = np.unique(np.array(values), return_inverse=True)[1]
    rng = np.random.default_rng([seed, 2])
    owner = np.empty(len(sizes), np.int64)
    order = np.argsort(codes, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        members = rng.permutation(members)
        edges = np.cumsum(rng.dirichlet(np.full(num_nodes, gamma)))
        middle = (np.cumsum(sizes[members]) - sizes[members] / 2) / max(sizes[members].sum(), 1)
        owner[members] = np.minimum(np.searchsorted(edges, middle), num_nodes - 1)
    for node in range(num_nodes):
        if not (owner == node).any():
            richest = np.bincount(owner, minlength=num_nodes).argmax()
            owner[np.flatnonzero(owner == richest)[0]] = node
    return owner
