"""`--validation`: weights found on text, printed with gap and losses; the same for our folders and for Llama's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from disk_models import read_model, write_model, write_models

from capibara.cli import main
from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, parameters, with_parameters
from capibara.core.tokenizer import train_bpe
from capibara.errors import ConfigError, DataError, RunError
from capibara.files import Files
from capibara.hf.llama import llama_config, our_array, our_name
from capibara.merge.merge import merge
from capibara.merge.recipe import Recipe, read_recipe

HERE = Path(__file__).parent
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! " * 30
CONFIG = ModelConfig(
    vocab_size=270, width=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden=16, max_length=32, norm_eps=1e-5
)
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 270, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": True,
}  # fmt: skip
THEIRS = [
    "model.embed_tokens.weight", "model.norm.weight", *(f"model.layers.0.{name}.weight" for name in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models that know the frequencies of the text, more or less, and one of NaN; ours, and as Llama folders."""
    folder = tmp_path_factory.mktemp("validation")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = train_bpe([TEXT], 270)
    base = ModularCapibaraModel(CONFIG, seed=0)
    rng = np.random.default_rng(0)
    ids = tokenizer.encode(TEXT)
    often = np.bincount(ids, minlength=270) > 0
    ours, theirs = [], []
    for number, strength in enumerate((0.6, 0.3, np.nan)):
        params = {name: np.asarray(leaf) for name, leaf in parameters(base).items()}
        pull = np.outer(np.where(often, 1.0, -1.0), np.ones(16)) * strength
        params["embedding"] = (pull + 0.2 * rng.standard_normal((270, 16))).astype(np.float32)
        model = with_parameters(base, params)
        model.tokenizer = tokenizer
        model.save(folder / f"ours{number}")
        ours.append(folder / f"ours{number}")
        named = {name: our_array(name, params[our_name(name)]) for name in THEIRS}
        theirs.append(folder / f"llama{number}")
        write_model(theirs[-1] / "model.safetensors", named)
        (theirs[-1] / "config.json").write_text(json.dumps(LLAMA))
        tokenizer.save(theirs[-1] / "tokenizer.json")
    return folder / "text.txt", tuple(ours), tuple(theirs)


def test_weights_gap_and_losses_are_found_printed_and_kept(folders, tmp_path, capsys):
    text, ours, _ = folders
    with pytest.raises(SystemExit) as caught:
        main(["merge", *map(str, ours), "-o", str(tmp_path / "out"), "--validation", str(text)])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ("merged by weighted", "gap", "global_convex", "best input", "does not count: not finite"):
        assert part in out
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    found = record["validation"]
    weights = [entry["weight"] for entry in record["inputs"]]
    assert weights[2] == 0 and sum(weights) == pytest.approx(1) and found["dual_gap"] < 1e-4
    losses = found["losses"]
    assert losses["this merge"] <= min(losses["input 0: ours0"], losses["input 1: ours1"]) + 1e-9
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not the merged network" in card and f"{losses['this merge']:.4f}" in card and "`global_convex`" in card
    merged = read_model(tmp_path / "out")
    inputs = [read_model(path) for path in ours[:2]]
    for name, value in merged.items():
        expected = weights[0] * inputs[0][name] + np.float32(weights[1]) * inputs[1][name]
        np.testing.assert_allclose(value, expected, atol=1e-6)
    again = merge(read_recipe(tmp_path / "out" / "recipe.toml"), tmp_path / "again")
    assert again.record["digest"] == record["digest"]


class FullDisk(Files):
    """There is room for a file's header, not for its weights."""

    def write_at(self, descriptor, data, offset):
        if offset == 0:
            return super().write_at(descriptor, data, offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed(paths, out, text):
    """A process that `victim.Dying` kills at its first write of weights."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path\n"
        "from victim import Dying\n"
        "from capibara.merge.merge import merge\n"
        "from capibara.merge.recipe import Recipe\n"
        "class AtTheWeights(Dying):\n"
        "    def write_at(self, descriptor, data, offset):\n"
        "        self.at = self.points + 1\n"
        "        self._point()\n"
        "text, out, *paths = map(Path, sys.argv[1:])\n"
        "merge(Recipe(tuple(paths), validation=text), out, files=AtTheWeights(0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(text), str(out), *map(str, paths)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def out_of_room(paths, out, text):
    with pytest.raises(RunError, match="goes on"):
        merge(Recipe(paths, validation=text), out, files=FullDisk())


@pytest.mark.parametrize("interrupt", [out_of_room, pytest.param(killed, marks=pytest.mark.slow)])
def test_weights_that_an_interrupted_merge_found_are_not_computed_again(folders, tmp_path, monkeypatch, interrupt):
    """The model of NaN is among them: what is read back must hold it as well."""
    text, ours, _ = folders
    recipe = Recipe(ours, validation=text)
    merge(recipe, tmp_path / "whole")
    interrupt(ours, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()

    def computed(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("capibara.consensus.merge_weights.find_weights", computed)
    assert not merge(recipe, tmp_path / "out").found
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert merge(recipe, tmp_path / "out").found
    (tmp_path / "other.txt").write_text(TEXT[:400])
    with pytest.raises(AssertionError, match="computed again"):
        merge(Recipe(ours, validation=tmp_path / "other.txt"), tmp_path / "out")


def test_llama_folders_are_weighed_as_the_same_models_of_ours(folders, tmp_path):
    text, ours, theirs = folders
    weights = []
    for number, paths in enumerate((ours, theirs)):
        report = merge(Recipe(paths[:2], validation=text), tmp_path / str(number))
        weights.append([entry["weight"] for entry in report.record["inputs"]])
    assert weights[0] == pytest.approx(weights[1], abs=1e-6)
    assert (tmp_path / "1" / "config.json").is_file()


def test_one_sequence_is_enough_to_weigh_but_not_to_cross_fit(folders, tmp_path):
    (tmp_path / "short.txt").write_text(TEXT[:40])
    report = merge(Recipe(folders[1][:2], validation=tmp_path / "short.txt"), tmp_path / "out")
    found = report.record["validation"]
    assert found["sequences"] == 1 and found["crossfit"] is None
    assert found["summary"].endswith("Give more text.") and found["caution"] in (tmp_path / "out/README.md").read_text()


def test_a_gap_that_is_not_of_the_weights_chosen_says_so(folders, tmp_path):
    """The same function with all hidden units negated: the mean of both knows nothing, and an input is chosen."""
    text, ours, _ = folders
    params = read_model(ours[0])
    for name in ("embedding", *(f"blocks.0.{name}" for name in ("query", "key", "value", "gate", "up", "out", "down"))):
        params[name] = -params[name]
    shutil.copytree(ours[0], tmp_path / "turned")
    write_model(tmp_path / "turned" / "model.safetensors", params)
    record = merge(Recipe((ours[0], tmp_path / "turned"), validation=text), tmp_path / "out").record
    found, card = record["validation"], (tmp_path / "out" / "README.md").read_text()
    assert found["losses"]["input 0: ours0"] == pytest.approx(found["losses"]["input 1: turned"], abs=1e-4)
    assert found["chosen"] in ("model 0", "model 1") and sorted(found["weights"]) == [0, 1]
    assert found["candidate"] == pytest.approx([0.5, 0.5], abs=1e-3) and found["candidate_loss"] > 0.1 + max(
        found["losses"]["input 0: ours0"], found["losses"]["input 1: turned"]
    )
    shares = ", ".join(f"{weight:.6g}" for weight in found["candidate"])
    assert f"**not of the weights above**: the search found {shares}" in card
    assert "value and gap are the candidate's (0: 0.500, 1: 0.500)" in found["summary"]


def test_what_cannot_be_weighed_is_refused(folders, tmp_path):
    text, ours, theirs = folders
    files, _ = write_models(tmp_path, 2)
    with pytest.raises(ConfigError, match="needs models that can be run"):
        merge(Recipe(tuple(files), validation=text), tmp_path / "out")
    with pytest.raises(ConfigError, match="finds the weights itself"):
        merge(Recipe(ours[:2], method="median", validation=text), tmp_path / "out")
    with pytest.raises(DataError):
        merge(Recipe(ours[:2], validation=tmp_path / "none.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [
    {"model_type": "gpt2"}, {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True},
    {"rope_parameters": {"rope_type": "llama3"}},
])  # fmt: skip
def test_a_llama_that_the_decoder_is_not_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change)).replace("rope_parameters", "rope_type")):
        llama_config(LLAMA | change)
    with pytest.raises(ConfigError, match="no parameter of a Llama"):
        our_name("model.layers.0.self_attn.q_proj.bias")
