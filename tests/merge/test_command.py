"""`capibara merge`, `merge inspect` and `merge diff`: what they print, what they refuse, and with which exit code."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from disk_models import BF16, random_model, read_model, write_folder, write_model, write_models

from capibara.cli import main
from capibara.consensus.certificate import digest_tree
from capibara.errors import RunError
from capibara.merge.inspect import diff, inspect
from capibara.merge.merge import merge
from capibara.merge.meter import Meter
from capibara.merge.recipe import Recipe, read_recipe


def run(capsys, *args):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


@pytest.fixture
def models(tmp_path):
    return write_models(tmp_path, 3)


def test_a_merge_prints_inputs_weights_and_digest(capsys, tmp_path, models):
    paths, tensors = models
    code, out, err = run(capsys, "merge", *paths[:2], "-o", tmp_path / "out", "--weights", "0.25,0.75")
    assert code == 0 and not err
    assert "merged by weighted: 108 parameters" in out and "0.7500" in out
    expected = {name: 0.25 * tensors[0][name] + np.float32(0.75) * tensors[1][name] for name in tensors[0]}
    found = read_model(tmp_path / "out")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)
    assert digest_tree(found)[0] in out
    code, out, _ = run(capsys, "merge", *paths[:2], "-o", tmp_path / "out", "--weights", "0.25,0.75")
    assert code == 0 and "was merged before" in out


def test_json_is_the_record(capsys, tmp_path, models):
    options = ["--dtype", "bfloat16", "--stochastic-rounding", "--seed", "3", "--shard-size", "200", "--json"]
    code, out, _ = run(capsys, "merge", *models[0], "-o", tmp_path / "out", *options)
    record = json.loads(out)
    assert code == 0 and record["method"] == "uniform" and record["seed"] == 3 and record["shard_size"] == 200
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    code, again, _ = run(capsys, "merge", "--recipe", tmp_path / "out" / "recipe.toml", "-o", tmp_path / "b", "--json")
    assert code == 0 and json.loads(again)["digest"] == record["digest"]


def test_a_file_can_be_the_output_and_has_its_record_beside_it(capsys, tmp_path, models):
    code, *_ = run(capsys, "merge", *models[0], "-o", tmp_path / "o.safetensors")
    assert code == 0 and read_model(tmp_path / "o.safetensors").keys() == models[1][0].keys()
    record = json.loads((tmp_path / "o.safetensors.merge.json").read_text())
    assert record["method"] == "uniform" and (tmp_path / "o.safetensors.recipe.toml").is_file()
    assert not (tmp_path / ".o.safetensors.merging").exists()
    assert run(capsys, "merge", *models[0], "-o", tmp_path / "o.safetensors")[0] == 0


REFUSED = {
    "no models": ([], "give two or more checkpoints"),
    "one model": (["A"], "There is nothing to merge with"),
    "a missing one": (["A", "nothing"], "nothing does not exist"),
    "an input as the output": (["A", "B", "-o", "B"], "is one of the inputs"),
    "an input through another path": (["A", "B", "-o", "./F/../B"], "is one of the inputs"),
    "an output inside an input": (["A", "F", "-o", "F/out"], "lies inside the input"),
    "an input inside the output": (["A", "F/model.safetensors", "-o", "F"], "or holds it"),
    "a negative weight": (["A", "B", "--weights", "1.5,-0.5"], "Weight 1 is -0.5"),
    "a weight of NaN": (["A", "B", "--weights", "nan,1"], "Weight 0 is nan"),
    "an infinite weight": (["A", "B", "--weights", "inf,1"], "Weight 0 is inf"),
    "too few weights": (["A", "B", "--weights", "1"], "1 weights for 2 checkpoints"),
    "weights that sum to 2": (["A", "B", "--weights", "1,1"], "sum to 2; they must sum to 1. Give 0.5,0.5"),
    "weights of 0": (["A", "B", "--weights", "0,0"], "sum to 0; they must sum to 1"),
    "weights that are words": (["A", "B", "--weights", "a,b"], "--weights takes numbers; got 'a'"),
    "weighted without weights": (["A", "B", "--method", "weighted"], "needs --weights"),
    "weights for a median": (["A", "B", "--method", "median", "--weights", "0.5,0.5"], "takes no weights"),
    "a method that is not there": (["A", "B", "--method", "medain"], "Did you mean 'median'"),
    "a dtype that is not there": (["A", "B", "--dtype", "bf16"], "Unknown dtype 'bf16'"),
    "rounding to 32 bits": (["A", "B", "--dtype", "float32", "--stochastic-rounding"], "Stochastic rounding is to 16"),
    "too many faulty": (["A", "B", "--method", "krum", "--faulty", "1"], "needs at least 5 inputs; got 2"),
    "faulty below 0": (["A", "B", "--method", "median", "--faulty", "-1"], "0 or more; got -1"),
    "faulty for a mean": (["A", "B", "--faulty", "1"], "knows no faulty inputs"),
    "a format that is not written": (["A", "B", "-o", "out.npz"], "written as safetensors"),
    "no folder to write to": (["A", "B", "-o", "nowhere/out"], "is no folder"),
    "a recipe and inputs": (["A", "--recipe", "r.toml"], "A recipe says everything; leave out the inputs"),
    "a recipe and options": (["--recipe", "r.toml", "--seed", "1"], "leave out --seed"),
    "a recipe that is not there": (["--recipe", "r.toml"], "is no recipe"),
    "another kind of file": (["A", "B", "-o", "out.pkl"], "written as safetensors"),
    "a shard size of words": (["A", "B", "--shard-size", "big"], "with KB, MB, GB or TB; got 'big'"),
    "a shard size of another unit": (["A", "B", "--shard-size", "5XB"], "with KB, MB, GB or TB; got '5XB'"),
    "a map for no input": (["A", "B", "--vocabulary-map", "5=m.json"], "for input 5; inputs are 0 to 1"),
    "a map without a file": (["A", "B", "--vocabulary-map", "1"], "NAME=VALUE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_sentence_and_writes_nothing(capsys, tmp_path, monkeypatch, name):
    for seed, file in enumerate("AB"):
        write_model(tmp_path / f"{file}.safetensors", random_model(seed))
    write_folder(tmp_path / "F", random_model(2))
    monkeypatch.chdir(tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    args, reason = REFUSED[name]
    args = [f"{arg}.safetensors" if arg.split("/")[-1] in ("A", "B") else arg for arg in args]
    code, out, err = run(capsys, "merge", *args, *([] if "-o" in args else ["-o", "out"]))
    assert code in (1, 2) and not out and reason in err and len(err.strip().splitlines()) == 1
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_can_be_the_output(capsys, tmp_path, models):
    (tmp_path / "empty").mkdir()
    code, out, _ = run(capsys, "merge", *models[0], "-o", tmp_path / "empty")
    assert code == 0 and f"{models[0][1]}  0.3333" in out
    assert "| 0.333333 |" in (tmp_path / "empty" / "README.md").read_text()
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_an_output_that_is_something_else_is_left_alone(capsys, tmp_path, models):
    for name in ("file.safetensors", "folder"):
        target = tmp_path / name
        (target / "x" if name == "folder" else target).parent.mkdir(exist_ok=True)
        (target / "x" if name == "folder" else target).write_text("mine")
        code, _, err = run(capsys, "merge", *models[0], "-o", target)
        assert code == 1 and "exists and is something else" in err
        assert (target / "x" if name == "folder" else target).read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users here")
def test_without_the_right_to_write_it_is_an_error(tmp_path, models):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o700)
    recipe = Recipe(tuple(models[0]))
    root = os.geteuid() == 0
    if root:
        above = [path for path in tmp_path.parents if path.is_relative_to(Path(tempfile.gettempdir()).resolve())]
        for path in (tmp_path, *above[:-1], *models[0]):
            path.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(RunError, match="Permission denied.*Name a place that you may write to"):
            merge(recipe, closed / "out")
        if root:
            with pytest.raises(RunError, match="cannot be entered .Permission denied.; name another place"):
                merge(recipe, shut / "inner" / "out")
    finally:
        if root:
            os.seteuid(0)
    assert not list(closed.iterdir())


def test_recipes_name_the_key_at_fault(tmp_path):
    path = tmp_path / "r.toml"
    for text, reason in [
        ("metod = 'uniform'", "Did you mean 'method'"),
        ("seed = 'x'", "seed must be a int"),
        ("seed = true", "seed must be a int"),
        ("inputs = [3]", "needs a path"),
        ("[[inputs]]\npath = 'a'\nwieght = 1", "Did you mean 'weight'"),
        ("[[inputs]]\npath = 'a'\nweight = 1\n[[inputs]]\npath = 'b'", "give every input a weight"),
        ("[options]\nscale = 'big'", "options are numbers"),
        ("method = ", "is no recipe"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_recipe(path)
        assert reason in str(caught.value)
    path.write_text("inputs = ['a', '/b']\nmethod = 'median'")
    assert read_recipe(path).inputs == (tmp_path / "a", tmp_path / "/b")


def test_a_recipe_of_other_inputs_is_refused(tmp_path, models):
    paths, tensors = models
    merge(Recipe(tuple(paths)), tmp_path / "out")
    write_model(paths[1], random_model(77))
    with pytest.raises(ValueError, match="is not what the recipe was made of"):
        merge(read_recipe(tmp_path / "out" / "recipe.toml"), tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


def test_inspect_shows_what_is_there(capsys, tmp_path):
    model = random_model(0, BF16)
    folder = write_folder(tmp_path / "a", model, tie_word_embeddings=True)
    code, out, _ = run(capsys, "merge", "inspect", folder, "--digests")
    assert code == 0 and "huggingface, 108 parameters, 216 B in 1 file" in out and "tied to the embedding" in out
    assert digest_tree(model)[0] in out
    found = inspect(folder, digests=True)
    assert {name: one["digest"] for name, one in found["tensors"].items()} == digest_tree(model)[1]
    assert run(capsys, "merge", "inspect", tmp_path / "none")[0] == 1


def test_diff_is_numpy(capsys, tmp_path, models):
    paths, tensors = models
    found = diff(paths[0], paths[1])
    a, b = (np.concatenate([model[name].ravel() for name in model]).astype(np.float64) for model in tensors[:2])
    assert found["whole"]["distance"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert found["whole"]["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert found["whole"]["largest"] == np.abs(b - a).max() and found["whole"]["different"] == (a != b).sum()
    assert run(capsys, "merge", "diff", paths[0], paths[1])[0] == 1
    code, out, _ = run(capsys, "merge", "diff", paths[0], paths[0])
    assert code == 0 and "the same tensors with the same numbers" in out


def test_diff_tells_near_equal_models_apart(tmp_path):
    model = random_model(0)
    near = {name: np.nextafter(value, np.float32(9)) for name, value in model.items()}
    a, b = write_model(tmp_path / "a.safetensors", model), write_model(tmp_path / "b.safetensors", near)
    whole = diff(a, b)["whole"]
    assert 1e-9 < whole["distance"] < 1e-6 and whole["different"] == 108


def test_diff_names_tensors_shapes_types_and_settings(tmp_path):
    model = random_model(0)
    a = write_folder(tmp_path / "a", model, hidden_act="silu")
    other = {n: v for n, v in model.items() if n != "scale"} | {"model.norm.weight": np.ones(5, np.float32)}
    b = write_folder(tmp_path / "b", other | {"model.layers.0.w": model["model.layers.0.w"].astype(BF16)})
    found = diff(a, b)
    assert not found["equal"] and found["only_in_a"] == ["scale"] and not found["only_in_b"]
    assert found["shapes"] == {"model.norm.weight": [[6], [5]]}
    assert found["dtypes"] == {"model.layers.0.w": ["F32", "BF16"]}
    assert found["settings"] == {"hidden_act": ["silu", None]}


def test_progress_is_bytes_a_second():
    import io

    from rich.console import Console

    clock, plain = iter([0.0, 0.0, 10.0, 19.0]), io.StringIO()
    console = Console(file=plain, force_terminal=False)
    meter = Meter(console=console, clock=lambda: next(clock))
    with meter:
        meter("merging", 0, 8_000_000_000)
        assert plain.getvalue() == ""  # what is soon done prints no line where there is no terminal
        meter("merging", 2_000_000_000, 8_000_000_000)
        meter("merging", 8_000_000_000, 8_000_000_000)
    assert meter.live is None and plain.getvalue() == "merging  2 GB of 8 GB  200 MB/s  30 s left\n"
    assert meter.line(2_000_000_000, 0, 2.0) == "merging  2 GB  1 GB/s"
    assert meter.line(2_000_000_000, 8_000_000_000, 2.0) == "merging  2 GB of 8 GB  1 GB/s  6 s left"
    drawn = io.StringIO()
    with Meter(console=Console(file=drawn, force_terminal=True, width=100), clock=lambda: 1.0) as meter:
        meter("merging", 10, 10)
    assert ("merging" in drawn.getvalue()) == (not os.environ.get("CI"))
