"""Merged folders in `transformers`: every method's output loads there whole, with the logits of our forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capibara.core.model import ModularCapibaraModel, with_parameters
from capibara.core.tokenizer import train_bpe
from capibara.files import read_tensors
from capibara.hf.llama import llama_config, our_array, our_name
from capibara.merge.merge import merge
from capibara.merge.methods import METHODS
from capibara.merge.recipe import Recipe

pytestmark = pytest.mark.peers

LOGITS = 1e-4
"""Of order 1; float32 on both sides, summed in another order."""

NUM_MODELS = 3
TEXT = "The capibara swims. A merge is read by two programs, and both say the same."


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request, tmp_path_factory) -> list[Path]:
    """A base and its fine-tunes as `save_pretrained` writes them; the second fine-tune is in several files."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=270, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2,
        tie_word_embeddings=request.param, pad_token_id=None, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    root = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    common = {name: torch.randn(weight.shape) for name, weight in before.items()}  # or Model Stock stays at the base
    folders = [root / name for name in ("base", *(f"tuned{i}" for i in range(NUM_MODELS)))]
    for number, folder in enumerate(folders):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(before[name] + bool(number) * 0.05 * (common[name] + torch.randn(weight.shape)))
        model.save_pretrained(folder, max_shard_size="10KB" if number == 2 else "1GB")
        train_bpe([TEXT], 270).save(folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert (folders[2] / "model.safetensors.index.json").exists()
    return folders


def our_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    shape = llama_config(json.loads((folder / "config.json").read_text()))
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file)
    params = {our_name(name): our_array(name, np.asarray(array, np.float32)) for name, array in tensors.items()}
    return np.asarray(with_parameters(ModularCapibaraModel(shape, seed=0), params)(ids.astype(np.int32)))


def their_logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the text by the folder's own tokenizer, and the logits; a missing or an odd tensor fails."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return ids.numpy(), model.eval()(ids).logits.numpy()


@pytest.mark.parametrize("name", METHODS)
def test_transformers_gives_a_merge_the_logits_that_we_give_it(folders, tmp_path, name):
    method = METHODS[name]
    recipe = Recipe(
        tuple(folders[1:]), method=name, base=folders[0] if method.base == "must" else None,
        weights=(0.5, 0.3, 0.2) if name == "weighted" else None, faulty=0 if method.per_fault is not None else None,
    )  # fmt: skip
    merge(recipe, tmp_path / "out")
    ids, theirs = their_logits(tmp_path / "out")
    assert ids.shape[1] > 8 and np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(our_logits(tmp_path / "out", ids), theirs, atol=LOGITS)
    base = our_logits(folders[0], ids)
    assert np.abs(base - theirs).max() > 100 * LOGITS, "the merge is the base, and the comparison shows little"


def test_a_merge_in_several_files_of_16_bits_is_loaded_too(folders, tmp_path):
    import torch
    import transformers

    merge(Recipe(tuple(folders[1:]), dtype="bfloat16", shard_size=8000), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    ids, theirs = their_logits(tmp_path / "out")
    np.testing.assert_allclose(our_logits(tmp_path / "out", ids), theirs, atol=LOGITS)
    asked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert asked.dtype == torch.bfloat16, "config.json names the type of the weights"
    assert asked.generation_config.eos_token_id == 2, "generation_config.json came along"
