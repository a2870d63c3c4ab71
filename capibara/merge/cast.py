"""Bytes of a file ↔ rows to add: bfloat16 and float16 to float32 exactly, and back, to the nearest or stochastically.

Stochastic rounding takes x to one of its two neighbours so that the mean is x. Whether a number goes up is decided by a
hash of (seed, tensor, its place in the tensor), so the size of blocks, the threads and a restart change nothing.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from capibara.kernels import arrays
from capibara.merge.tensors import numpy_type

_16 = np.uint32(16)


def decode(raw: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """Numbers of a file as floats of the dtype of `out`.

    Args:
      raw: uint8, the bytes.
      dtype: As safetensors names it.
      out: Room for the result; not used where the bytes can be seen as they are.
    """
    if dtype == "BF16" and out.dtype == np.float32:
        bits = out.view(np.uint32)
        np.copyto(bits, raw.view(np.uint16))
        np.left_shift(bits, _16, out=bits)
        return out
    values = raw.view(numpy_type(dtype))
    if values.dtype == out.dtype:
        return values
    np.copyto(out, values)
    return out


class Rounding:
    """Floats to bytes of one dtype.

    Args:
      dtype: Of the output, as safetensors names it.
      stochastic: Whether to round to 16 bits at random, without bias, instead of to the nearest (ties to even).
      seed: Of the random numbers.
    """

    def __init__(self, dtype: str, *, stochastic: bool = False, seed: int = 0):
        self.dtype, self.seed = dtype, seed
        self.stochastic = stochastic and dtype in ("BF16", "F16")
        self.numpy = numpy_type(dtype)

    def encode(self, values: np.ndarray, name: str, start: int) -> np.ndarray:
        """The bytes uint8 of numbers `start`, start + 1, … of the tensor `name`.

        `values` may be written over.
        """
        if self.stochastic:
            bits = _random(self._key(name), start, len(values))
            as_float32 = values if values.dtype == np.float32 else values.astype(np.float32)
            return (_stochastic_bf16 if self.dtype == "BF16" else _stochastic_f16)(as_float32, bits).view(np.uint8)
        if values.dtype == self.numpy:
            return values.view(np.uint8)
        if self.dtype == "BF16" and values.dtype == np.float32:
            return arrays.to_bfloat16(values, threads=1).view(np.uint8)
        with np.errstate(over="ignore"):  # the caller looks for infinities
            return values.astype(self.numpy).view(np.uint8)

    def _key(self, name: str) -> int:
        return int.from_bytes(blake3(f"{self.seed}\0{name}".encode()).digest(8), "little")


def is_finite(encoded: np.ndarray, dtype: str) -> bool:
    """Whether bytes that were encoded hold neither an infinity nor NaN."""
    if dtype == "BF16":
        exponents = np.bitwise_and(encoded.view(np.uint16), np.uint16(0x7F80))
        return int(exponents.max(initial=0)) < 0x7F80
    return bool(np.isfinite(encoded.view(numpy_type(dtype))).all())


def _stochastic_bf16(values: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Adds 16 random bits below the last that stays: the carry has the probability of the part that is cut."""
    total = values.view(np.uint32) + (random & np.uint32(0xFFFF))
    return np.right_shift(total, _16).astype(np.uint16)


def _stochastic_f16(values: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Goes away from zero with probability (|x| − below) / (above − below), its neighbours in float16."""
    size = np.abs(values)
    with np.errstate(over="ignore"):
        near = size.astype(np.float16)
    bits = near.view(np.uint16) - (near.astype(np.float32) > size).astype(np.uint16)
    below = bits.view(np.float16).astype(np.float32)
    above = (bits + np.uint16(1)).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # above the largest, the share is 0 and the caller sees no infinity
        share = (size - below) / np.minimum(above - below, np.float32(32.0))
    up = random * np.float32(2.0**-32) < share
    signs = (values.view(np.uint32) >> _16).astype(np.uint16) & np.uint16(0x8000)
    return (bits + up.astype(np.uint16)) | signs


def _random(key: int, start: int, count: int) -> np.ndarray:
    """uint32[count]: a hash of key and place (SplitMix64's finaliser, Steele et al. 2014), its upper half."""
    z = np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(32)).astype(np.uint32)
