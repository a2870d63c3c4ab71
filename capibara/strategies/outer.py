"""The outer optimiser: what the coordinator makes of the merged delta Δ, with −Δ as the pseudo-gradient.

SGD with learning rate 1 takes the merge as it is. Nesterov (DiLoCo, Douillard et al. 2023): b ← μb + Δ,
θ ← θ + η(Δ + μb).
"""

from __future__ import annotations

import numpy as np
import optax

NESTEROV_AT_30 = {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}
"""Best η by number of nodes at H = 30 and μ = 0.9 (DiLoCo scaling laws, Charles et al. 2025); independent of size."""


def outer_sgd(learning_rate: float = 1.0) -> optax.GradientTransformation:
    """θ ← θ + η Δ; with η = 1 the merged model itself."""
    return optax.sgd(learning_rate)


def outer_nesterov(learning_rate: float, momentum: float = 0.9) -> optax.GradientTransformation:
    """Nesterov momentum on the merged deltas; the first step moves by (1 + μ) η Δ."""
    return optax.sgd(learning_rate, momentum=momentum, nesterov=True)


def outer_learning_rate(num_nodes: int, local_steps: int) -> float:
    """η(n, H) for Nesterov: the table at H = 30, interpolated in log₂ n, times (H/30)^0.1, within [0.3, 1].

    η rises with H; the exponent is ours and puts η at H = 500 at 0.8 for 2 and 4 nodes, 1.0 for 8 (DiLoCo itself, 8
    nodes: 0.7).
    """
    counts = np.array(sorted(NESTEROV_AT_30))
    rates = np.array([NESTEROV_AT_30[int(count)] for count in counts])
    at_30 = float(np.interp(np.log2(max(num_nodes, 1)), np.log2(counts), rates))
    return float(np.clip(at_30 * (local_steps / 30) ** 0.1, 0.3, 1.0))
