"""Model Stock: as far from the base towards the mean of the fine-tuned models as their agreement allows.

    θ = t · mean(θᵢ) + (1 − t) · θ₀,   t = m cosω / (1 + (m − 1) cosω)

ω is the angle between two task vectors, θ₀ their foot: fine-tuned models lie on a thin shell around a centre, and t is
where the perpendicular from the centre meets the line. Jang et al. 2024 (arXiv 2403.19522, §4).
"""

from __future__ import annotations

import numpy as np

from capibara.consensus.ballot import Merge


def model_stock() -> Merge:
    """Model Stock per tensor, as the paper's layer-wise form; for m > 2 rows cosω is the mean of the pairs' cosines.

    The paper has one angle for all pairs and does not say how to find it from m rows that disagree. Rows are deltas, so
    the merge is t · mean of them; weights are ignored. A mean cosine below 0 counts as 0 (t = 0, the base); a zero row
    is at right angles to any other. One row alone is taken as it is.

    Tolerates: nothing by itself; rows that point everywhere shrink the step to nothing, which stops harm and progress.
    Cost: two passes over each tensor, in blocks of any length: only the m×m products must be known.
    Fails when: the rows are no fine-tunes of one base, or one hostile row turns the mean cosine to 0.
    """
    return Merge("model_stock", combine=_stock, per_tensor=True)


def model_stock_whole() -> Merge:
    """Model Stock with one t for the whole model: the angle is between whole task vectors.

    Tolerates: as `model_stock`.
    Cost: one pass for the products, one for the sum.
    Fails when: tensors agree to very different degrees: they all move by the same share.
    """
    return Merge("model_stock_whole", combine=_stock)


def _stock(w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    m = len(w)
    if m == 1:
        return np.ones(1)
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = (inverse[:, None] * gram * inverse[None, :])[np.triu_indices(m, 1)]
    cosine = float(cosines.mean().clip(0.0, 1.0))
    return np.full(m, cosine / (1.0 + (m - 1) * cosine))
