"""What can be an input, and which inputs do not go together: refused with the tensor and both shapes."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from disk_models import BF16, SHAPES, random_model, read_model, write_folder, write_model, write_models, write_shards

from capibara.core.config import ModelConfig
from capibara.errors import CapibaraError, ConfigError, DataError
from capibara.merge.merge import merge
from capibara.merge.recipe import Recipe
from capibara.merge.sources import open_checkpoint
from capibara.merge.stream import Reader
from capibara.merge.tensors import numpy_type


def values(checkpoint):
    """All numbers, through the reader that merging uses, two bytes at a time where that divides."""
    found = {}
    with Reader() as reader:
        for name, tensor in checkpoint.tensors.items():
            size = numpy_type(tensor.dtype).itemsize
            raw = np.empty(tensor.numbers * size, np.uint8)
            for first in range(tensor.numbers):
                reader.read(0, tensor, first, raw[first * size : (first + 1) * size].data)
            found[name] = raw.view(numpy_type(tensor.dtype)).reshape(tensor.shape)
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_file_a_folder_and_shards_hold_the_same(tmp_path):
    model = random_model(0, BF16)
    for path, kind in [
        (write_model(tmp_path / "x.safetensors", model), "safetensors"),
        (write_folder(tmp_path / "folder", model), "huggingface"),
        (write_shards(tmp_path / "shards", model), "safetensors"),
        (write_shards(tmp_path / "index", model) / "model.safetensors.index.json", "safetensors"),
    ]:
        checkpoint = open_checkpoint(path)
        assert checkpoint.kind == kind
        same(values(checkpoint), model)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_holds_the_same_transposed_and_big_endian_arrays_too(tmp_path, save):
    arrays = random_model(0) | {"half": np.ones(3, np.float16), "whole": np.arange(12).reshape(3, 4)}
    odd = {"columns": np.asfortranarray(arrays["model.layers.0.w"]), "big": np.arange(5).astype(">f4")}
    save(tmp_path / "x.npz", **arrays, **odd)
    expected = arrays | {"columns": odd["columns"], "big": np.arange(5.0, dtype=np.float32)}
    same(values(open_checkpoint(tmp_path / "x.npz")), expected)


def test_npz_of_objects_is_refused_and_nothing_of_it_runs(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "x.npz", a=np.array([Exploit()], dtype=object))
    with pytest.raises(DataError, match="dtype object"):
        open_checkpoint(tmp_path / "x.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-30])
    with pytest.raises(DataError, match="not a whole NPZ archive"):
        open_checkpoint(tmp_path / "cut.npz")
    assert not (tmp_path / "ran").exists()


def test_pickles_are_refused_unopened(tmp_path):
    for path in (tmp_path / "x.pt", tmp_path / "folder" / "pytorch_model.bin"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps({}))
    for path in (tmp_path / "x.pt", tmp_path / "folder"):
        with pytest.raises(DataError, match="run its code"):
            open_checkpoint(path)


def test_what_a_model_saves_is_merged_into_what_a_model_loads(tmp_path):
    from capibara.core.model import ModularCapibaraModel, parameters

    config = ModelConfig(vocab_size=31, width=8, num_layers=1, num_heads=2, hidden=8, max_length=16)
    models = [ModularCapibaraModel(config, seed=seed) for seed in (0, 1)]
    for number, model in enumerate(models):
        model.save(tmp_path / str(number))
    report = merge(Recipe((tmp_path / "0", tmp_path / "1")), tmp_path / "out")
    assert report.record["inputs"][0]["kind"] == "capibara"
    merged = parameters(ModularCapibaraModel.load(tmp_path / "out"))
    for name, value in merged.items():
        mean = (np.asarray(parameters(models[0])[name]) + np.asarray(parameters(models[1])[name])) / 2
        np.testing.assert_allclose(value, mean, atol=1e-7)


def test_a_run_gives_its_newest_intact_checkpoint(tmp_path):
    from synthetic_run import make_run

    make_run(tmp_path / "run", 3, keep_checkpoints=3).close()
    newest = open_checkpoint(tmp_path / "run")
    before = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert newest.kind == "run" and "step-00000003" in str(newest.files[0])
    assert values(newest).keys() == values(before).keys()
    raw = bytearray(newest.files[0].read_bytes())
    raw[-1] ^= 1
    newest.files[0].write_bytes(raw)
    assert open_checkpoint(tmp_path / "run").files == before.files
    with pytest.raises(CapibaraError, match="changed"):
        open_checkpoint(newest.files[0].parent)


@pytest.mark.parametrize("managed", [False, True])
def test_orbax_checkpoints_hold_the_same(tmp_path, managed):
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    tree = {"a": {"b": jnp.arange(12.0).reshape(3, 4)}, "l": [jnp.ones(5, jnp.bfloat16), jnp.zeros((), jnp.int32)]}
    path = tmp_path / "orbax"
    if managed:
        with ocp.CheckpointManager(path) as manager:
            manager.save(3, args=ocp.args.StandardSave(tree))  # pyright: ignore[reportAttributeAccessIssue]
            manager.wait_until_finished()
        path = path / "3"
    else:
        with ocp.StandardCheckpointer() as saver:
            saver.save(path, tree)
    expected = {"a.b": np.arange(12.0, dtype=np.float32).reshape(3, 4), "l.0": np.ones(5, BF16)}
    expected |= {"l.1": np.zeros((), np.int32)}
    same(values(open_checkpoint(path)), expected)
    merge(Recipe((path, write_model(tmp_path / "x.safetensors", expected))), tmp_path / "out")
    same(read_model(tmp_path / "out"), expected)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    folder = write_shards(tmp_path / "a", random_model(0))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    where, first = content["weight_map"], next(iter(content["weight_map"]))
    for change, reason in [
        ({**where, "ghost": where[first]}, "holds tensor 'ghost'; it does not"),
        ({name: file for name, file in where.items() if name != first}, f"holds tensor '{first}', of which"),
        ({**where, first: "../../etc/passwd"}, "not beside it"),
        ({}, "no weight_map"),
        ({**where, first: 3}, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": change}))
        with pytest.raises(DataError) as caught:
            open_checkpoint(folder)
        assert reason in str(caught.value)


@pytest.mark.parametrize("make", ["nothing", "text", "empty folder", "two files"])
def test_what_is_no_checkpoint_is_refused_with_what_would_be_one(tmp_path, make):
    path = tmp_path / "x"
    if make == "text":
        path.write_text("hello")
    if make == "empty folder":
        path.mkdir()
    if make == "two files":
        for name in "ab":
            write_model(path / f"{name}.safetensors", random_model(0))
    with pytest.raises(DataError, match=r"Give a \.safetensors file|which tensor is where"):
        open_checkpoint(path)


def refused(tmp_path, a, b, **recipe):
    with pytest.raises(ConfigError) as caught:
        merge(Recipe((a, b), **recipe), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    return str(caught.value)


def test_shapes_that_differ_are_named_with_both(tmp_path):
    a = write_model(tmp_path / "a.safetensors", random_model(0))
    b = write_model(tmp_path / "b.safetensors", random_model(0, shapes=SHAPES | {"model.layers.0.w": (5, 7)}))
    assert "Tensor 'model.layers.0.w' has shape (7, 5) in" in (text := refused(tmp_path, a, b)) and "(5, 7)" in text
    c = write_model(tmp_path / "c.safetensors", random_model(0, shapes=SHAPES | {"model.embed_tokens.weight": (13, 6)}))
    text = refused(tmp_path, a, c)
    assert "(11, 6)" in text and "(13, 6)" in text and "--vocabulary-map" in text


def test_tensors_that_one_lacks_are_named_with_their_shape(tmp_path):
    a = write_model(tmp_path / "a.safetensors", random_model(0))
    b = write_model(tmp_path / "b.safetensors", random_model(0, shapes=SHAPES | {"more": (2, 3)}))
    for left, right in [(a, b), (b, a)]:
        text = refused(tmp_path, left, right)
        assert "a.safetensors has no tensor 'more'" in text and "(2, 3)" in text


def test_kinds_of_numbers_that_differ_are_refused(tmp_path):
    a, b = random_model(0), random_model(1)
    b["scale"] = np.array(3)
    text = refused(tmp_path, write_model(tmp_path / "a.safetensors", a), write_model(tmp_path / "b.safetensors", b))
    assert "'scale' holds F32" in text and "I64" in text


def test_integers_that_differ_are_refused(tmp_path):
    paths = [write_model(tmp_path / f"{i}.safetensors", {"ids": np.arange(i, i + 4)}) for i in (0, 1)]
    with pytest.raises(ConfigError, match="'ids' holds I64, which cannot be averaged, and differs"):
        merge(Recipe(tuple(paths)), tmp_path / "out")


def test_tokenizers_that_differ_are_refused_with_the_token(tmp_path):
    a, b = write_folder(tmp_path / "a", random_model(0)), write_folder(tmp_path / "b", random_model(1), tokens="abd")
    text = refused(tmp_path, a, b)
    assert "token 'c' has id 2 in the first and none in the second" in text and "--vocabulary-map" in text
    content = json.loads((a / "tokenizer.json").read_text())
    (b / "tokenizer.json").write_text(json.dumps(content, indent=3))  # the same in another layout
    merge(Recipe((a, b)), tmp_path / "out")


@pytest.mark.parametrize("change", [{"num_attention_heads": 3}, {"model_type": "gpt2"}, {"id2label": {"0": "cat"}}])
def test_configurations_that_mean_other_weights_are_refused(tmp_path, change):
    a, b = write_folder(tmp_path / "a", random_model(0)), write_folder(tmp_path / "b", random_model(1), **change)
    assert f"{next(iter(change))} is " in refused(tmp_path, a, b)


def test_a_tied_head_stored_twice_is_the_same_model(tmp_path):
    model, tied = random_model(0), {"tie_word_embeddings": True}
    head = {"lm_head.weight": model["model.embed_tokens.weight"]}
    a = write_folder(tmp_path / "a", model | head, **tied)
    b = write_folder(tmp_path / "b", random_model(1), **tied)
    merge(Recipe((a, b)), tmp_path / "out")
    assert read_model(tmp_path / "out").keys() == model.keys()


def test_a_head_of_its_own_beside_a_tied_one_is_refused_with_its_shape(tmp_path):
    a = write_folder(tmp_path / "a", random_model(0) | {"lm_head.weight": np.ones((11, 6), np.float32)})
    b = write_folder(tmp_path / "b", random_model(1))
    assert "'lm_head.weight' of shape (11, 6) is a head of its own" in refused(tmp_path, a, b)


def test_vocabulary_rows_go_where_the_map_says(tmp_path):
    """b has the first's tokens in other places and one more; token 4 it lacks, so the first's row stands for it."""
    rng = np.random.default_rng(0)
    order = rng.permutation(12)[:11]
    rows = [int(row) for row in order]
    rows[4] = None
    a, b = random_model(0), random_model(1, shapes=SHAPES | {"model.embed_tokens.weight": (12, 6)})
    left, right = write_folder(tmp_path / "a", a), write_folder(tmp_path / "b", b, tokens="zyx", vocab_size=12)
    (tmp_path / "map.json").write_text(json.dumps(rows))
    merge(Recipe((left, right), vocabulary_maps={1: tmp_path / "map.json"}), tmp_path / "out")
    ours, theirs = a["model.embed_tokens.weight"], b["model.embed_tokens.weight"]
    expected = np.stack([(ours[j] + (ours[j] if row is None else theirs[row])) / 2 for j, row in enumerate(rows)])
    np.testing.assert_allclose(read_model(tmp_path / "out")["model.embed_tokens.weight"], expected, atol=1e-7)
    for wrong in (rows[:-1], [*rows[:-1], 12], "abc", [1.5] * 11):
        (tmp_path / "map.json").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match="vocabulary map"):
            merge(Recipe((left, right), vocabulary_maps={1: tmp_path / "map.json"}), tmp_path / "out2")


def test_a_model_of_nan_is_named(tmp_path):
    paths, models = write_models(tmp_path, 3)
    models[1]["model.norm.weight"][2] = np.nan
    write_model(paths[1], models[1])
    for method in ("uniform", "median"):
        with pytest.raises(DataError, match=r"'model.norm.weight' of .*m1.safetensors holds NaN"):
            merge(Recipe(tuple(paths), method=method), tmp_path / method)
        assert not (tmp_path / f".{method}.merging").exists()  # the same command would fail again


def test_numbers_that_do_not_fit_the_output_are_an_error(tmp_path):
    paths = tuple(write_model(tmp_path / f"{i}.safetensors", {"w": np.full(4, 1e5, np.float32)}) for i in range(2))
    with pytest.raises(DataError, match="too large for float16"):
        merge(Recipe(paths, dtype="float16"), tmp_path / "out")


def test_quantised_numbers_are_refused(tmp_path):
    import ml_dtypes

    model = {"w": np.ones(4, ml_dtypes.float8_e4m3fn)}
    paths = tuple(write_model(tmp_path / f"{i}.safetensors", model) for i in range(2))
    with pytest.raises(ConfigError, match="quantised"):
        merge(Recipe(paths), tmp_path / "out")
