"""What int8 weights cost in quality: the loss of a Llama with float32 and with int8 weights on the same text.

    python benchmarks/int8_loss.py FOLDER TEXT…      a Hugging Face folder, and files of text

The first `WINDOWS` windows of `TOKENS` tokens of each file. The difference is per token, with its standard error. The
matrices and the head are rounded as `generate(weights="int8")` rounds them; the embedding is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from _common import emit, row, say
from _merge_llama import read_llama

WINDOWS, TOKENS, AT_ONCE = 16, 256, 2


def main() -> None:
    """Prints the rise of the loss for every file."""
    if len(sys.argv) < 3:
        sys.exit("Give a Hugging Face folder of a Llama and one or more files of text.")
    from capibara.runtime import prepare_process

    prepare_process()
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from capibara.core.model import ModularCapibaraModel, with_parameters
    from capibara.kernels.int8 import dequantize, quantize

    shape, params, tokenizer = read_llama(Path(sys.argv[1]))
    key = "embedding" if shape.tie_embeddings else "head"
    rounded = {
        name: np.asarray(dequantize(quantize(w, by_columns=name == key))) if w.ndim == 2 else w
        for name, w in params.items()
        if name == key or name != "embedding"
    }
    start = ModularCapibaraModel(shape, seed=0)
    exact = with_parameters(start, params), jnp.asarray(params[key])
    int8 = with_parameters(start, {**rounded, "embedding": params["embedding"]}), jnp.asarray(rounded[key])

    @nnx.jit
    def losses(model, head, rows):
        logits = jnp.einsum("btd,vd->btv", model.hidden(rows[:, :-1]), head)
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]

    found = []
    for path in map(Path, sys.argv[2:]):
        ids = np.asarray(tokenizer.encode(path.read_text()[: 16 * WINDOWS * TOKENS]), np.int32)
        count = min(WINDOWS, len(ids) // (TOKENS + 1)) // AT_ONCE * AT_ONCE
        rows = ids[: count * (TOKENS + 1)].reshape(-1, AT_ONCE, TOKENS + 1)
        before, after = (np.array([losses(*model, part) for part in rows]).ravel() for model in (exact, int8))
        rise = after - before
        error = rise.std() / rise.size**0.5
        say(f"{path.name}: {before.mean():.4f} → {after.mean():.4f}, {rise.mean():+.4f} ± {error:.4f}")
        spread = rise.mean() - 2 * error, rise.mean() + 2 * error
        label = f"rise of the loss: {path.name}, {rise.size} tokens"
        found.append(row(label, round(float(rise.mean()), 5), "nats", spread=spread))
    emit("int8_loss", found)


if __name__ == "__main__":
    main()
