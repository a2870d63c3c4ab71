"""Does a round's kept deltas give the vote that its certificate records?

    digests of the rows and of the merged Δ  →  Σ vᵢΔᵢ = merged Δ  →  the vote, repeated
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from capibara.consensus.certificate import digest_rows, digest_tree

Replay = Callable[[dict[str, Any], dict[str, np.ndarray]], tuple[list[str], Any, dict[str, np.ndarray]]]
"""`(line, stack of raw deltas, leaves [n, ...]) -> (reasons after the vote, coefficients[n] or None, merged delta)`."""

TOLERANCE = 1e-5
"""Of coefficients, and of merged deltas relative to the longest row in them. The vote is done in float64, the sum of
rows in float32; other machines differ in the last bits, liars in the first ones (docs/protocol.md, what must hold)."""

COUNTED = ("backed", "outvoted")


def delta_problems(
    line: Mapping[str, Any], stack: dict[str, np.ndarray], merged: dict[str, np.ndarray]
) -> list[str]:
    """What kept deltas say otherwise than the digests and coefficients of their line; no vote is repeated.

    Args:
      line: The certificate.
      stack: Leaves [n, ...].
      merged: The merged delta.

    Returns:
      One sentence for each thing that does not check.
    """
    nodes, wrong = line["nodes"], []
    digests = digest_rows(stack, len(nodes))
    for i, node in enumerate(nodes):
        if node["digest"] is not None and digests[i] != node["digest"]:
            wrong.append(f"the row of node {node['id']} is not the one that the certificate names.")
        if node["digest"] is None and any(leaf[i].any() for leaf in stack.values()):
            wrong.append(f"has a row for node {node['id']}, which delivered nothing ({node['reason']}).")
    if digest_tree(merged)[0] != line["delta_digest"]:
        wrong.append("the merged delta is not the one that the certificate names.")
    if wrong or any(node["coefficient"] is None for node in nodes):
        return wrong
    v = np.array([node["coefficient"] for node in nodes], np.float64)
    if (v < 0).any() or not abs(max(0.0, 1 - v.sum()) - line["coefficient_start"]) <= TOLERANCE:
        wrong.append(f"the coefficients {v.tolist()} and {line['coefficient_start']} are not shares of one.")
    counted = [i for i in range(len(nodes)) if v[i] != 0]
    if not _distance(_combination(v, stack), merged) <= TOLERANCE * _longest(stack, counted):
        wrong.append("the merged delta is not the sum that the certificate's coefficients give.")
    return wrong


def replay_problems(
    line: dict[str, Any], stack: dict[str, np.ndarray], merged: dict[str, np.ndarray], replay: Replay
) -> list[str]:
    """What the vote, repeated by `replay`, gives otherwise than its line; arguments and result as above."""
    reasons, coefficients, delta = replay(line, stack)
    nodes, wrong = line["nodes"], []
    for node, reason in zip(nodes, reasons, strict=True):
        if reason != node["reason"]:
            wrong.append(f"node {node['id']} is {reason}, the line says {node['reason']}.")
    if coefficients is not None:
        v = np.asarray(coefficients, np.float64)
        recorded = np.array([np.nan if node["coefficient"] is None else node["coefficient"] for node in nodes])
        gap = np.nan_to_num(np.abs(v - recorded), nan=np.inf)
        if gap.max() > TOLERANCE:
            i = int(gap.argmax())
            wrong.append(f"node {nodes[i]['id']} gets {v[i]:.6g}, the line says {recorded[i]:.6g}.")
    counted = [i for i, node in enumerate(nodes) if node["reason"] in COUNTED]
    if delta.keys() != merged.keys() or not _distance(delta, merged) <= TOLERANCE * _longest(stack, counted):
        wrong.append("the merged delta comes out differently.")
    return wrong


def _combination(v: np.ndarray, stack: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Σ vᵢ Δᵢ in float64; a row with coefficient 0 contributes nothing, whatever it holds."""
    used = np.flatnonzero(v)
    return {
        name: sum((v[i] * leaf[i].astype(np.float64) for i in used), np.zeros(leaf.shape[1:]))
        for name, leaf in stack.items()
    }


def _distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    gaps = (np.subtract(a[name], b[name], dtype=np.float64).ravel() for name in b)
    return float(np.sqrt(sum(gap @ gap for gap in gaps)))


def _longest(stack: dict[str, np.ndarray], rows: list[int]) -> float:
    """The largest norm of the given rows; float64 holds the squares of any float32."""
    squares = [sum(float(np.sum(np.square(leaf[i], dtype=np.float64))) for leaf in stack.values()) for i in rows]
    return float(np.sqrt(max(squares, default=0.0)))
