"""The command as a user meets it: exit codes, one sentence for every mistake, results and JSON on standard output."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tiny_text
from click.testing import CliRunner, Result

from capibara.cli import main
from capibara.kernels.library import instruction_set
from capibara.run.directory import CERTIFICATES, Run

LINE = re.compile(
    r"round \d+/2  step \d+  loss \d+\.\d{4}  test \d+\.\d{4}  [\d,]+ tokens/s  [\d:]+ left  backing 3/4  committed  "
    r"\(3 low quality\)"
)


KINDS = ("threads", "frequency", "allocator", "kernels", "bfloat16")
"""What `doctor --speed` finds fault with."""


def call(*arguments: object, **options: str) -> Result:
    """The command in this process; its allocator stays as it is, for other tests."""
    runner = CliRunner(env={"CAPIBARA_ALLOCATOR": "0", "COLUMNS": "80"}, **options)
    result = runner.invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def commands(group: click.Group = main, *above: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its words."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield (*above, name), command


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Result]:
    """A folder with text, a configuration and a run of two rounds in which node 3 lied; and what was printed."""
    folder = tiny_text.make(tmp_path_factory.mktemp("cli"), rounds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CAPIBARA_DATA", raising=False)
        result = call("train", folder / "tiny.toml", "--run", folder / "runs/a", "--attack", "scale:-1000")
    assert result.exit_code == 0, result.stderr
    return folder, result


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    return shutil.copytree(trained[0] / "runs/a", tmp_path / "run")


def head(run: Path) -> str:
    return json.loads((run / CERTIFICATES).read_text().splitlines()[-1])["hash"]


@pytest.mark.parametrize("words, command", [pytest.param(*found, id=" ".join(found[0])) for found in commands()])
def test_every_command_explains_itself_and_each_of_its_options(words, command):
    result = call(*words, "--help")
    assert result.exit_code == 0
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)
    assert "as_json" in [option.name for option in options]
    listed = call(*words[:-1], "--help").stdout.split("Commands:")[1]
    assert "..." not in listed, "the first sentence of a command fits its line in the list"


MISTAKES = {
    "no such command": (["demmo"], "No such command 'demmo'"),
    "no configuration": (["train"], "Missing argument 'CONFIG'"),
    "a typo in a flag": (["train", "tiny-cpu", "--atack", "nan"], "Did you mean '--attack'?"),
    "an unknown preset": (["train", "tiny-gpu"], "Did you mean 'tiny-cpu'?"),
    "a missing file": (["config", "check", "none.toml"], "There is no configuration file none.toml"),
    "a folder": (["config", "check", "."], "Name a TOML file"),
    "an unknown attack": (["train", "tiny-cpu", "--attack", "sign_flop"], "Did you mean 'sign_flip'?"),
    "no strength": (["demo", "--attack", "scale:much"], "needs a number after the colon"),
    "a typo in --set": (["train", "tiny-cpu", "--set", "training.batch_sise=3"], "Did you mean 'batch_size'?"),
    "no value in --set": (["train", "tiny-cpu", "--set", "training"], "training"),
    "too many liars": (["train", "tiny-cpu", "--set", "consensus.num_faulty=7"], "num_faulty"),
    "a number out of range": (["generate", "run", "--top-p", "1.5"], "1.5 is not in the range"),
}


@pytest.mark.parametrize("arguments, told", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_ends_with_2(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and told in result.stderr and not result.stdout
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

    as_json = call(*arguments, "--json")
    assert as_json.exit_code == 2 and not as_json.stderr
    error = json.loads(as_json.stdout)
    assert (error["ok"], error["exit_code"]) == (False, 2)
    assert told in error["error"]


READERS = (("resume",), ("verify",), ("generate",), ("runs", "show"))


@pytest.mark.parametrize("words", READERS, ids=" ".join)
def test_what_is_no_run_is_told_by_every_command_that_wants_one(words, tmp_path):
    later = tmp_path / "later"
    later.mkdir()
    (later / "format.json").write_text('{"format_version": 99}')
    for path, told in [
        (tmp_path / "none", "There is no run"),
        (tmp_path, "is not a run directory"),
        (later, "has format_version 99; this capibara knows up to 1. Update capibara."),
    ]:
        result = call(*words, path)
        assert result.exit_code == 1
        assert told in result.stderr and result.stderr.count("\n") == 1


def test_a_run_of_one_model_is_shown_as_one_and_not_resumed(tmp_path):
    with Run.create(tmp_path / "runs/solo-1", "") as made:
        (made.path / "solo.json").write_text("{}")
        (made.path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5, "eval_loss": 2.25, "tokens_per_s": 1000}\n')
    solo = tmp_path / "runs/solo-1"
    refused = call("resume", solo)
    assert refused.exit_code == 1 and "one model of UnifiedTrainer, not a consensus" in refused.stderr
    assert re.search(r"10 +2\.5000 +2\.2500 +1,000", call("runs", "show", solo).stdout)
    assert "one model, 10 steps" in call("runs", "ls", tmp_path / "runs").stdout
    assert "it has checkpoints and no votes" in call("verify", solo).stdout


def test_a_round_is_one_plain_line_where_there_is_no_terminal(trained):
    _, result = trained
    rounds = [line for line in result.stderr.splitlines() if line.startswith("round")]
    assert len(rounds) == 2
    assert all(LINE.fullmatch(line) for line in rounds), rounds


def test_a_run_ends_with_its_rounds_the_liar_the_test_loss_and_three_commands_that_work(trained):
    folder, result = trained
    assert re.search(r"2 +committed .* 3/4 +3 low quality", result.stdout)
    assert "Named as lying or broken: node 3 (low quality in 2 of 2 rounds)." in result.stdout
    assert re.search(r"test loss [\d.]+ → [\d.]+ nats a token \(change -[\d.]+ ± [\d.]+, paired, 8 seq", result.stdout)
    assert "lower by more than two standard errors" in result.stdout
    following = result.stdout.split("Next:\n")[1].splitlines()
    assert len(following) == 3
    for command in following:
        words = re.sub("'([^']*)'", lambda quoted: quoted[1].replace(" ", "_"), command).split()[1:]
        assert call(*words).exit_code == 0, command


def test_resuming_a_finished_run_changes_nothing_and_prints_one_json_object(run):
    before = (run / CERTIFICATES).read_bytes()
    result = call("resume", run, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    outcome = json.loads(result.stdout)
    assert outcome["head"] == head(run)
    assert outcome["named"] == [3] and outcome["accused"] == {"3": {"low_quality": 2}}
    assert [entry["round"] for entry in outcome["history"]] == [0, 1]
    assert (run / CERTIFICATES).read_bytes() == before


def test_a_loss_that_is_no_number_is_json_all_the_same(run):
    metrics = run / "metrics.jsonl"
    metrics.write_text(re.sub(r'"loss": [\d.]+', '"loss": "nan"', metrics.read_text()))

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    shown = json.loads(call("runs", "show", run, "--json").stdout, parse_constant=refuse)
    assert [entry["loss"] for entry in shown["rounds"]] == ["nan", "nan"]


def test_a_run_in_use_is_neither_resumed_nor_trained_over(run):
    with Run.open(run):
        result = call("resume", run)
    assert result.exit_code == 1 and "is in use by process" in result.stderr
    assert "runs/tiny.toml" not in result.stderr


def test_training_into_a_folder_that_holds_a_run_says_how_to_go_on_with_it(trained, run):
    result = call("train", trained[0] / "tiny.toml", "--run", run)
    assert result.exit_code == 1
    assert f"Resume it with `capibara resume {run}`" in result.stderr


def test_a_run_that_cannot_be_prepared_leaves_nothing_behind(tmp_path):
    folder = tiny_text.make(tmp_path, documents=3)
    result = call("train", folder / "tiny.toml", "--run", folder / "runs/a")
    assert result.exit_code == 1 and "The text is too short" in result.stderr
    assert not (folder / "runs/a").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(trained, tmp_path):
    (tmp_path / "file").write_text("")
    for words in (
        ("init", tmp_path / "file/x.toml"),
        ("train", trained[0] / "tiny.toml", "--run", tmp_path / "file/run"),
    ):
        result = call(*words)
        assert result.exit_code == 1
        assert "Not a directory" in result.stderr and result.stderr.count("\n") == 1


def test_verify_accepts_what_was_made_and_names_what_was_changed(trained, run):
    good = call("verify", run, "--expect", head(run))
    assert good.exit_code == 0
    assert "good: 2 certificates, 2 checkpoints, 2 of 2 kept votes replayed" in good.stdout
    wrong = call("verify", run, "--expect", "0" * 64, "--no-replay")
    assert wrong.exit_code == 1 and "BAD  rounds.jsonl: ends in" in wrong.stdout
    file = run / "checkpoints/step-00000002/params.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    report = call("verify", run, "--json")
    assert report.exit_code == 1
    (problem,) = json.loads(report.stdout)["problems"]
    assert problem["place"] == "checkpoints/step-00000002/params.safetensors"


def test_the_same_seed_writes_the_same_text(run):
    texts = [call("generate", run, "--max-tokens", 12, "--seed", seed, "--prompt", "we").stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("we")
    written = json.loads(call("generate", run, "--max-tokens", 12, "--seed", 1, "--prompt", "we", "--json").stdout)
    assert texts[0] == written["prompt"] + written["text"] + "\n"


def test_runs_are_listed_in_the_order_of_their_numbers_with_the_damaged_ones(run):
    for name in ("demo-10", "demo-2", "broken"):
        shutil.copytree(run, run.parent / "runs" / name)
    (run.parent / "runs/broken" / CERTIFICATES).write_bytes(b"no certificate\n")
    (run.parent / "runs/file").write_text("")
    listed = json.loads(call("runs", "ls", run.parent / "runs", "--json").stdout)["runs"]
    assert [Path(entry["run"]).name for entry in listed] == ["broken", "demo-2", "demo-10"]
    assert "line 1" in listed[0]["problem"]
    assert (listed[1]["rounds"], listed[1]["committed"], listed[1]["head"]) == (2, 2, head(run))
    table = call("runs", "ls", run.parent / "runs")
    assert table.exit_code == 0 and "damaged" in table.stdout and listed[0]["problem"] in table.stdout


def test_an_empty_folder_of_runs_says_how_to_make_one(tmp_path):
    result = call("runs", "ls", tmp_path)
    assert result.exit_code == 0 and "`capibara demo` makes one" in result.stdout
    assert json.loads(call("runs", "ls", tmp_path, "--json").stdout) == {"runs": []}


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_letters_shows_the_same_words(run, charset):
    plain, whole = call("runs", "show", run, charset=charset), call("runs", "show", run)
    assert plain.exit_code == 0
    assert plain.stdout.replace("-", "") == whole.stdout.replace("─", "").replace("–", "")
    assert head(run) in plain.stdout


def test_init_writes_a_configuration_that_is_good_and_overwrites_none(tmp_path):
    path = tmp_path / "mine.toml"
    assert call("init", path).exit_code == 0
    before = path.read_bytes()
    assert "good." in call("config", "check", path).stdout
    again = call("init", path)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert path.read_bytes() == before


def test_an_attack_called_nan_is_a_name(tmp_path):
    shown = json.loads(call("train", "tiny-cpu", "--attack", "nan", "--print-config", "--json").stdout)
    assert shown["config"]["consensus"]["attack"] == "nan"
    assert shown["origins"]["consensus.attack"] == "command line"


def test_the_doctor_finds_a_device_here():
    result = call("doctor", "--json")
    assert result.exit_code == 0
    findings = json.loads(result.stdout)
    assert findings["devices"] and findings["problem"] is None
    assert findings["devices"][0] in call("doctor").stdout


@pytest.mark.slow
def test_the_doctor_measures_shares_of_a_peak_that_nothing_exceeds():
    """A quarter of room: the clock may change between the peak and what is compared with it."""
    speed = json.loads(call("doctor", "--speed", "--json").stdout)["speed"]
    shares = {row["what"]: row["share"] for row in speed["rows"] if row["share"] is not None}
    if instruction_set():
        assert {"product, float32", "attention, with gradient", "training step", "the vote's products"} <= set(shares)
        assert all(0.01 < shares[what] < 1.25 for what in shares if "products" not in what), shares
    assert all(row["value"] > 0 for row in speed["rows"])
    assert all(finding.split(":")[0] in KINDS for finding in speed["findings"])


def test_a_certificate_names_the_kernels_that_ran(run):
    lines = (run / CERTIFICATES).read_text().splitlines()
    assert lines and all(json.loads(line)["environment"]["kernels"] == instruction_set() for line in lines)


def test_a_reader_that_goes_away_is_no_error_of_ours(run):
    process = tiny_text.start("runs", "show", run)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()
