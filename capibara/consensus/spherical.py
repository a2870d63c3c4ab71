"""Merges on the sphere: directions and lengths of the rows, apart from each other.

    nᵢ = ‖xᵢ‖,  uᵢ = xᵢ/nᵢ,  all from the tensor's products ⟨xᵢ, xⱼ⟩; the merge is Σ vᵢxᵢ

Each works tensor by tensor and is linear in the rows, with numbers v from the tensor's m×m products: files need two
passes over a tensor, in blocks of any length, and no whole tensor in memory. The base does not matter to the formula:
rows may be models' own weights, as in most merges of files, or deltas, as in a round.

References: SLERP, Shoemake 1985 (Animating rotation with quaternion curves). Karcher mean, Karcher 1977; on spheres,
Buss & Fillmore 2001 (ACM Trans. Graphics 20(2), Alg. A1). RDA, the outer merge of Decoupled DiLoCo (2026).
"""

from __future__ import annotations

import numpy as np

from capibara.consensus.ballot import Merge

MOST_STEPS = 64
"""Karcher steps; on directions within a half-sphere each gains at least a digit, so this is never reached there."""

CONVERGED = 1e-12
"""Length of a Karcher step, in radians, below which the mean has been found."""

NO_DIRECTION = 1e-6
"""A sum of unit vectors shorter than this has no direction that rounding did not choose."""


def slerp() -> Merge:
    """Spherical interpolation, per tensor, of the vectors as they are: sin((1−t)Ω)/sinΩ · x₀ + sin(tΩ)/sinΩ · x₁.

    Ω is the angle between x₀ and x₁ and t = w₁ the weight of the second; the lengths are not made equal first (the
    usual variant for models). More than two rows: from the weighted mean direction b = Σwᵢuᵢ/‖Σwᵢuᵢ‖ one step along
    Σwᵢ log_b(uᵢ), which is the same formula for two rows and does not depend on their order; the coefficients aᵢ of the
    direction Σaᵢuᵢ then stand before the xᵢ. `karcher` repeats that step and averages the lengths apart.

    Tolerates: nothing of its own: one long row carries the merge with it; in a round the vote's leash bounds it.
    Cost: two passes over each tensor.
    Fails when: the weighted directions cancel (antipodal rows) or a row is zero: there is no direction then, and the
      weighted mean is taken, as also for rows in one line.
    """
    return Merge("slerp", combine=lambda w, gram: _on_sphere(w, gram, steps=1, lengths_apart=False), per_tensor=True)


def karcher() -> Merge:
    """Karcher mean, per tensor: the direction u with Σwᵢ log_u(uᵢ) = 0, at the weighted mean length Σwᵢnᵢ.

    The point of least weighted squared angle to the rows' directions, by the iteration of Buss & Fillmore 2001, from
    the weighted mean direction.

    Tolerates: any length of few rows no better than the mean does; nothing of its own against directions.
    Cost: two passes over each tensor; the iteration is on m numbers.
    Fails when: the directions do not lie within a half-sphere: the mean is not unique; or as `slerp`, with the weighted
      mean as the answer.
    """
    return Merge(
        "karcher", combine=lambda w, gram: _on_sphere(w, gram, steps=MOST_STEPS, lengths_apart=True), per_tensor=True
    )


def rda() -> Merge:
    """Direction and length averaged apart, per tensor: (Σwᵢnᵢ) · φ(Σwᵢφ(xᵢ)), φ(x) = x/‖x‖ and φ(0) = 0.

    Unlike the mean it does not shrink as 1/√m when deltas are nearly at right angles. Decoupled DiLoCo 2026 averages
    embeddings plainly; here they are tensors like any other.

    Tolerates: a row's length moves only the length of the merge, not its direction.
    Cost: two passes over each tensor.
    Fails when: rows nearly cancel: what is left of them, mostly noise, is drawn out to full length; where they cancel
      entirely, the weighted mean is taken.
    """
    return Merge("rda", combine=_direction_and_length, per_tensor=True)


def _on_sphere(w: np.ndarray, gram: np.ndarray, *, steps: int, lengths_apart: bool) -> np.ndarray:
    norms, cosines = _cosines(gram)
    if (norms == 0).any():
        return w
    a = w / np.sqrt(max(w @ cosines @ w, NO_DIRECTION**2))
    if w @ cosines @ w < NO_DIRECTION**2:
        return w
    for _ in range(steps):
        cos = (cosines @ a).clip(-1, 1)
        angle = np.arccos(cos)
        sin = np.sin(angle)
        if ((cos < 0) & (sin < NO_DIRECTION)).any():
            return w
        pull = w * np.divide(angle, sin, out=np.ones_like(sin), where=sin > NO_DIRECTION)
        step = pull - (pull @ cos) * a
        length = np.sqrt(max(step @ cosines @ step, 0.0))
        if length < CONVERGED:
            break
        a = np.cos(length) * a + np.sin(length) / length * step
        a = a / np.sqrt(a @ cosines @ a)
    return a * (w @ norms) / norms if lengths_apart else a


def _direction_and_length(w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    norms, cosines = _cosines(gram)
    squared = w @ cosines @ w
    if squared < NO_DIRECTION**2:
        return w
    a = w * (w @ norms) / np.sqrt(squared)
    return np.divide(a, norms, out=np.zeros_like(a), where=norms > 0)


def _cosines(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = inverse[:, None] * gram * inverse[None, :]
    return norms, cosines.clip(-1, 1)
