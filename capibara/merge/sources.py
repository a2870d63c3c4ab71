"""Opens what people call a checkpoint: a file or a folder, read only as far as its headers.

    x.safetensors   x.safetensors.index.json   x.npz   a Hugging Face folder   what `model.save` wrote
    a run directory (its newest intact checkpoint)   one `checkpoints/step-N`   an Orbax folder

Pickles are refused: opening one runs its code.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from blake3 import blake3

from capibara.errors import CertificateError, DataError, RunError
from capibara.merge.header import read_header
from capibara.merge.tensors import Checkpoint, Stored, Tensor

INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
KINDS = f"a .safetensors file, a *{INDEX}, an .npz file, or a folder of a model, a run or an Orbax checkpoint"

CONVERT = (
    "Convert it to safetensors first, where you trust it (`safetensors.torch.save_file`); `IncrementalSoupStrategy` "
    "reads pickles of plain arrays without running anything."
)

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
"""Files of a model folder that belong to the model and go to the output as they are."""

CHUNK = 2**20


def open_checkpoint(path: Path | str) -> Checkpoint:
    """A checkpoint's tensors and where their bytes lie; nothing of the weights is read.

    Raises:
      DataError: If there is nothing, or nothing that can be read, or the files do not agree with each other.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist. Give {KINDS}; nothing is downloaded.")
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(INDEX):
        tensors, files = _sharded(path)
        return Checkpoint(path, "safetensors", tensors, files=files)
    if path.suffix == ".safetensors":
        return Checkpoint(path, "safetensors", _stored(path), files=(path,))
    if path.suffix == ".npz":
        from capibara.merge.npz import npz_tensors

        return Checkpoint(path, "npz", npz_tensors(path), files=(path,))
    if path.suffix in PICKLES:
        raise DataError(f"{path} is a pickle: opening it would run its code. {CONVERT}")
    raise DataError(f"{path} is no checkpoint that can be read. Give {KINDS}.")


def _folder(path: Path) -> Checkpoint:
    if (path / "format.json").is_file() and (path / "checkpoints").is_dir():
        return _run(path)
    if (path / "state.json").is_file() and (path / "params.safetensors").is_file():
        return _step(path, path)
    if (path / "_METADATA").is_file() or (path / "_CHECKPOINT_METADATA").is_file():
        from capibara.merge.orbax import orbax_tensors

        tensors, files = orbax_tensors(path)
        return Checkpoint(path, "orbax", tensors, files=files)
    tensors, files = _weights(path)
    carried: dict[str, Path | bytes] = {name: path / name for name in CARRIED if (path / name).is_file()}
    if "config.json" not in carried:
        return Checkpoint(path, "safetensors", tensors, {}, carried, files)
    config = _read_json(path / "config.json")
    kind = "capibara" if "width" in config and "model_type" not in config else "huggingface"
    return Checkpoint(path, kind, tensors, config, carried, files)


def _weights(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The tensors of a model folder: those of its index, of `model.safetensors`, or of the one file it has."""
    found = sorted(path.glob("*.safetensors"))
    indices = sorted(path.glob(f"*{INDEX}"))
    if len(indices) == 1:
        return _sharded(indices[0])
    if len(indices) > 1:
        raise DataError(f"{path} has {len(indices)} index files; give the one that is meant, as {indices[0]}.")
    whole = path / "model.safetensors"
    if whole in found or len(found) == 1:
        file = whole if whole in found else found[0]
        return _stored(file), (file,)
    if found:
        raise DataError(f"{path} has {len(found)} .safetensors files and no *{INDEX} that says which tensor is where.")
    if any(file.suffix in PICKLES for file in path.iterdir()):
        raise DataError(
            f"{path} holds its weights as a pickle, and opening that would run its code. {CONVERT}"
        )
    raise DataError(f"{path} holds no checkpoint. Give {KINDS}.")


def _stored(path: Path) -> dict[str, Tensor]:
    entries = read_header(path).entries
    return {name: Tensor(e.dtype, e.shape, Stored(path, e.offset)) for name, e in entries.items()}


def _sharded(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise DataError(f"{index} has no weight_map from tensors to files.")
    if outside := next((name for name in where.values() if Path(name).name != name), None):
        raise DataError(f"{index} names the file {outside!r}, which is not beside it.")
    tensors: dict[str, Tensor] = {}
    names = sorted(set(where.values()))
    for name in names:
        shard = _stored(index.parent / name)
        listed = {tensor for tensor, file in where.items() if file == name}
        if missing := sorted(listed - shard.keys()):
            raise DataError(f"{index} says that {name} holds tensor {missing[0]!r}; it does not.")
        if extra := sorted(shard.keys() - listed):
            raise DataError(f"{name} holds tensor {extra[0]!r}, of which {index} says nothing or something else.")
        tensors |= shard
    return tensors, tuple(index.parent / name for name in names)


def _run(path: Path) -> Checkpoint:
    from capibara.run.checkpoint import checkpoints
    from capibara.run.directory import check_format

    check_format(path)
    reasons = []
    for folder in reversed(checkpoints(path)):
        try:
            return _step(folder, path)
        except (CertificateError, DataError) as error:
            reasons.append(str(error))
    raise RunError(f"{path} has no intact checkpoint. " + (reasons[0] if reasons else "Let it finish a round first."))


def _step(folder: Path, shown: Path) -> Checkpoint:
    """One checkpoint of a run, its digest checked; it becomes a folder that `ModularCapibaraModel.load` reads."""
    from capibara.run.checkpoint import read_state

    file = folder / "params.safetensors"
    expected = read_state(folder)["digests"].get(file.name)
    if not file.is_file() or file_digest(file) != expected:
        raise CertificateError(f"{file} is missing or has been changed: its digest is not the one on record.")
    run = folder.parent.parent
    carried: dict[str, Path | bytes] = {}
    config: dict[str, Any] = {}
    if (run / "config.toml").is_file() and (run / "tokenizer.json").is_file():
        from capibara.core.config import ModelConfig
        from capibara.core.tokenizer import load_tokenizer

        section = tomllib.loads((run / "config.toml").read_text())["model"]
        vocab_size = load_tokenizer(run / "tokenizer.json").vocab_size
        config = ModelConfig(**{**section, "vocab_size": vocab_size}).model_dump(mode="json")
        carried = {"config.json": json.dumps(config, indent=1).encode(), "tokenizer.json": run / "tokenizer.json"}
    return Checkpoint(shown, "run", _stored(file), config, carried, (file,))


def file_digest(path: Path) -> str:
    """BLAKE3 (hex) of a file, in constant memory."""
    hasher = blake3()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({error}).") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object.")
    return content
