"""Orbax checkpoints, array by array through TensorStore (which Flax brings with it); no JAX and no devices.

Their files hold compressed chunks, so an array is read whole: peak memory grows by the largest array of every input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from capibara.errors import DataError
from capibara.merge.tensors import SAFETENSORS, Loaded, Tensor

METADATA = "_METADATA"


def orbax_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The arrays of a checkpoint (or of the `default` item of one step of a manager), and its files.

    Raises:
      DataError: If TensorStore is not installed, or the folder holds no tree of arrays.
    """
    try:
        import tensorstore
    except ImportError:
        raise DataError(f"{path} is an Orbax checkpoint; reading it needs `pip install tensorstore`.") from None
    folder = path if (path / METADATA).is_file() else path / "default"
    try:
        about = json.loads((folder / METADATA).read_text())
        leaves = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in about["tree_metadata"].values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no Orbax checkpoint of a tree of arrays ({error}).") from None
    driver = "zarr3" if about.get("use_zarr3") else "zarr"
    base: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/"}
    if about.get("use_ocdbt", True):
        base = {"driver": "ocdbt", "base": base}
    tensors = {}
    for keys in leaves:
        name = ".".join(keys)
        spec = {"driver": driver, "kvstore": {**base, "path": f"{name}/"}}
        try:
            array = tensorstore.open(spec, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: array {name!r} cannot be opened ({str(error).splitlines()[0]}).") from None
        dtype = SAFETENSORS.get(array.dtype.name)
        if dtype is None:
            raise DataError(f"{path}: array {name!r} has dtype {array.dtype.name}, which is none that can be merged.")
        tensors[name] = Tensor(dtype, tuple(array.shape), Loaded(lambda array=array: _read(array)))
    return tensors, tuple(sorted(file for file in folder.rglob("*") if file.is_file()))


def _read(array: Any) -> np.ndarray:
    values = np.asarray(array.read().result())
    return np.ascontiguousarray(values).reshape(values.shape)
