"""Configuration files: every mistake with its line, column and caret; who overrides whom; `extends`; origins."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from capibara.cli import main
from capibara.core.config import ModularConfig
from capibara.core.toml import render_with_origins
from capibara.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file of a configuration and returns its path."""

    def write(text: str, name: str = "c.toml") -> Path:
        (tmp_path / name).write_bytes(text.encode())
        return tmp_path / name

    return write


def refused(path: Path, *overrides: str) -> str:
    """The message with which a file is refused."""
    with pytest.raises(ConfigError) as error:
        ModularConfig.from_toml(path, overrides)
    return str(error.value)


def test_a_typo_shows_line_column_caret_and_the_nearest_name(write):
    path = write("[model]\nwidth = 64\n\n[training]\n  batch_sise = 4  # too many\n")
    first, *pointing = refused(path).splitlines()
    assert first.startswith("Unknown key 'batch_sise'. Did you mean 'batch_size'? Known: accumulation_steps, ")
    assert pointing == [
        f"  --> {path}:5:3",
        "  5 |   batch_sise = 4  # too many",
        "    |   ^^^^^^^^^^^^^^",
    ]


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ('[consensus]\nvoting_strategy = "byzantine_tolerent"\n', "2:1", "Did you mean 'byzantine_tolerant'?"),
        ("[consensus]\nnum_nodes = 4\nvoting_strategy = 'krum'\n", "3:1", "needs at least 5 nodes; got num_nodes = 4"),
        ("[consensus]\nnum_nodes = 8\nconsensus_threshold = 0.75\nnum_faulty = 3\n", "4:1", "at least 10 nodes"),
        ("[consensus]\nnum_nodes = 7\nnum_faulty = 1\nconsensus_threshold = 0.9\n", "3:1", "0.8571 or less"),
        ("[consensus]\nstrategies = ['plain', 'plane']\n", "2:1", "Did you mean 'plain'?"),
        ("[consensus]\nattack = 'scale:x'\n", "2:1", "needs a number after the colon"),
        ("[trainin]\nseed = 1\n", "1:2", "Unknown section 'trainin'. Did you mean 'training'?"),
        ("training = 3\n", "1:1", "training is a section"),
        ("[[training]]\nseed = 1\n", "1:3", "training is a section"),
        ("batch_size = 4\n", "1:1", "Unknown section 'batch_size'."),
        ("training.batch_sise = 4\n", "1:1", "Did you mean 'batch_size'?"),
        ("training = { seed = 1, batch_sise = 4 }\n", "1:24", "Did you mean 'batch_size'?"),
        ('[training]\n"batch_sise" = 4\n', "2:1", "Did you mean 'batch_size'?"),
        ("[training.adam]\nbeta = 1\n", "1:2", "Unknown key 'adam'."),
        ("[training]\nbatch_size = 'four'\n", "2:1", "batch_size should be a valid integer"),
        ("[training]\nbatch_size = true\n", "2:1", "batch_size is a number; got true."),
        ("[training]\nbatch_size = '''\nx'''\n", "2:1", "batch_size should be a valid integer"),
        ("[model]\nwidth = 100\nnum_heads = 3\n", "2:1", "not a multiple of num_heads"),
        ("[training]\r\nbatch_sise = 4\r\n", "2:1", "Did you mean 'batch_size'?"),
        ("\ufeff[training]\nbatch_sise = 4\n", "2:1", "Did you mean 'batch_size'?"),
        ("# größer\n[training]\nschedule = 'größer'\n", "3:1", "schedule should be"),
        ("[data]\npath = ['ä', 3]\n", "2:1", "path should be"),
        ("[training]\nseed = 4 4\n", "2:10", "Expected newline or end of document after a statement."),
        ("[training\n", "1:10", "Expected ']' at the end of a table declaration."),
        ("[training]\nseed = 1\nseed = 2\n", "3:9", "Cannot overwrite a value."),
        ("[training]\nseed = '", "2:9", "Expected"),
        ("extends = 4\n", "1:1", "extends is a list of files and presets; got 4."),
        ("extends = ['tiny-cup']\n", "1:1", "Unknown preset 'tiny-cup'. Did you mean 'tiny-cpu'?"),
        ("extends = ['nowhere.toml']\n", "1:1", "There is no configuration file"),
        ("extends = ['c.toml']\n", "1:1", "extends goes in a circle"),
    ],
)
def test_every_mistake_in_a_file_has_its_place(write, text, place, expected):
    path = write(text)
    message = refused(path)
    assert expected in message
    assert f"--> {path}:{place}\n" in message
    source, caret = message.splitlines()[-2:]
    assert caret.strip(" |").strip("^") == "" and caret.endswith("^")
    assert caret.index("^") - source.index("|") - 1 == int(place.split(":")[1])


def test_several_mistakes_are_told_in_the_order_of_the_file(write):
    message = refused(write("[training]\nseed = -1\nbatch_sise = 4\n[trainin]\n[model]\nwidth = 1\n"))
    assert [line.split(":")[-2] for line in message.splitlines() if "-->" in line] == ["2", "3", "4", "6"]


def test_a_mistake_in_a_base_file_points_there(write):
    base = write("[training]\nbatch_sise = 4\n", "base.toml")
    assert f"--> {base}:2:1" in refused(write("extends = ['base.toml']\n"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "There is no configuration file {path}. `capibara init {path}` writes one."),
        (lambda path: path.write_bytes(b"[data]\npath = '\xff'\n"), "{path} is not UTF-8 (byte 15); save it as UTF-8."),
        (lambda path: path.mkdir(), "{path} cannot be read: Is a directory. Name a TOML file."),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, make, expected):
    path = tmp_path / "c.toml"
    make(path)
    assert refused(path) == expected.format(path=path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batch_sise=4", "Did you mean 'batch_size'?"),
        ("trainin.batch_size=4", "Did you mean 'training'?"),
        ("training.batch_size=four", "batch_size should be a valid integer"),
        ("training.seed.x=4", "training.seed.x goes into 'seed', which is a value and not a section."),
    ],
)
def test_a_mistake_on_the_command_line_or_in_the_environment_says_where(write, monkeypatch, override, expected):
    path = write("[training]\nseed = 1\n")
    message = refused(path, override)
    assert expected in message and message.endswith("(command line)")
    key, _, value = override.partition("=")
    variable = "CAPIBARA_" + key.upper().replace(".", "__")
    monkeypatch.setenv(variable, value)
    message = refused(path)
    assert expected in message and message.endswith(f"(environment {variable})")


@pytest.mark.parametrize("override", ["batch_size=4", "training.batch_size", "training=4"])
def test_an_override_has_one_form(write, override):
    assert "An override is SECTION.KEY=VALUE" in refused(write(""), override)


def test_each_source_overrides_the_ones_before_it(write, monkeypatch):
    """Default < extends, in order < file < environment < command line, and each value knows where it is from."""
    write("[training]\nbatch_size = 2\nwarmup_steps = 2\nseed = 2\nlog_every = 2\n[consensus]\nseed = 2\n", "base.toml")
    path = write("extends = ['tiny-cpu', 'base.toml']\n\n[training]\nwarmup_steps = 3\nseed = 3\nlog_every = 3\n")
    monkeypatch.setenv("CAPIBARA_TRAINING__SEED", "4")
    monkeypatch.setenv("CAPIBARA_TRAINING__LOG_EVERY", "4")
    monkeypatch.setenv("CAPIBARA_SPEC", "not a setting")
    config = ModularConfig.from_toml(path, ["training.log_every=5"])
    training, origins = config.training, config.origins
    assert (training.batch_size, training.warmup_steps, training.seed, training.log_every) == (2, 3, 4, 5)
    assert config.model.width == 96 and training.beta1 == 0.9
    assert origins["model.width"] == "preset tiny-cpu"
    assert origins["training.batch_size"] == f"file {path.parent / 'base.toml'}:2"
    assert origins["training.warmup_steps"] == f"file {path}:4"
    assert origins["training.seed"] == "environment CAPIBARA_TRAINING__SEED"
    assert origins["training.log_every"] == "command line"
    assert "training.beta1" not in origins


def test_the_environment_can_be_left_out(write, monkeypatch):
    """A run's own file is complete: what resumes it must not depend on who resumes it."""
    monkeypatch.setenv("CAPIBARA_MODEL__WIDTH", "64")
    path = write("")
    assert ModularConfig.from_toml(path).model.width == 64
    assert ModularConfig.from_toml(path, environment={}).model.width == 128


def test_extends_goes_in_no_circle(write):
    write("extends = 'c.toml'\n", "base.toml")
    message = refused(write("extends = 'base.toml'\n"))
    assert "extends goes in a circle: " in message and message.count("c.toml") >= 2
    assert "base.toml:1:1" in message


def test_a_diamond_of_bases_is_no_circle(write):
    write("[training]\nseed = 7\n", "root.toml")
    write("extends = 'root.toml'\n", "left.toml")
    write("extends = 'root.toml'\n", "right.toml")
    assert ModularConfig.from_toml(write("extends = ['left.toml', 'right.toml']\n")).training.seed == 7


@pytest.mark.parametrize(
    ("override", "value"),
    [("data.path=/some where", "/some where"), ("data.path=['a', 'b']", ("a", "b")), ("data.path=none", None)],
)
def test_an_override_is_toml_or_a_bare_word(write, override, value):
    assert ModularConfig.from_toml(write("[data]\npath = 'x'\n"), [override]).data.path == value


def test_a_file_unsets_what_its_base_sets(write):
    config = ModularConfig.from_toml(write("extends = 'tiny-cpu'\n[consensus]\nconsensus_threshold = 'none'\n"))
    assert config.consensus.consensus_threshold is None


def test_every_value_is_shown_with_its_origin(write):
    config = ModularConfig.from_toml(write("[training]\nseed = 3\n"), ["consensus.num_nodes=5"])
    rows = dict(row.split(maxsplit=1) for row in render_with_origins(config).splitlines())
    fields = {f"{name}.{key}" for name in type(config).model_fields for key in type(getattr(config, name)).model_fields}
    assert set(rows) == fields
    assert rows["training.seed"].split(maxsplit=1) == ["3", f"file {config.origins['training.seed'][5:]}"]
    assert rows["consensus.num_nodes"].split(maxsplit=1) == ["5", "command line"]
    assert rows["consensus.attack"].split() == ["none", "default"]


def test_a_value_set_in_python_is_shown_as_such(write):
    config = ModularConfig.from_toml(write("[training]\nseed = 3\n")).replace(training={"seed": 4})
    (row,) = [row for row in render_with_origins(config).splitlines() if row.startswith("training.seed")]
    assert row.split(maxsplit=2)[1:] == ["4", "set in Python"]


def test_the_command_ends_with_2_and_prints_the_place(write):
    path = write("[training]\nbatch_sise = 4\n")
    done = CliRunner().invoke(main, ["config", "check", str(path)])
    assert done.exit_code == 2
    assert f"--> {path}:2:1" in done.stderr and "Did you mean 'batch_size'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_typo_in_a_flag_names_the_nearest_one(write):
    done = CliRunner().invoke(main, ["config", "check", str(write("")), "--print-confg"])
    assert done.exit_code == 2
    assert "--print-config" in done.stderr


def test_print_config_shows_origins(write):
    path = write("[training]\nseed = 3\n")
    done = CliRunner().invoke(main, ["config", "check", str(path), "--set", "consensus.num_nodes=5", "--print-config"])
    assert done.exit_code == 0, done.output
    assert f"file {path}:2" in done.output and "command line" in done.output
