"""The command `capibara`: parses, calls, prints. No decision about training is taken here.

What it prints, and what a failure ends with, is `capibara.cli_output`. Heavy imports stay inside the commands, so that
`capibara --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from capibara import __version__
from capibara.cli_merge import add_merge
from capibara.cli_output import Command, command, note_to, say


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="capibara")
def main() -> None:
    """Train language models by consensus: n nodes train, vote, and leave a certificate of every merge.

    Start with `capibara demo`, or `capibara init` for text of your own.

    Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted.
    """


@main.group()
def runs() -> None:
    """List and show runs."""


@main.group()
def config() -> None:
    """Check configuration files."""


RUN = click.argument("run", type=click.Path(path_type=Path))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
    help="Override a value of the configuration, e.g. training.num_rounds=3; may be repeated.",
)  # fmt: skip
ATTACK_HELP = "Let the last f nodes lie, e.g. scale:-10, sign_flip or alie."


@command(main, "demo")
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="Run directory (default runs/demo-N).")
@click.option("--attack", default="scale:-10", show_default=True, metavar="NAME[:STRENGTH]", help="How two nodes lie.")
@SET
def demo(run_dir: Path | None, attack: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Eight nodes train on presidents' speeches, two of them lie.

    The vote names the liars and keeps them out; the rest is merged, round after round. Takes about a minute on two
    cores, then shows the rounds, who was named, the loss on held-out text before and after, and a sample. Needs
    pip install 'capibara[demo]'.
    """
    _start_process()
    from capibara.training.session import open_session

    changes = ("consensus.keep_deltas=true", _attack(attack), *overrides)
    with open_session(_load("tiny-cpu", changes), run_dir=run_dir, kind="demo", note=note_to(as_json)) as session:
        _run(session, as_json, sample="The ")


@command(main, "init")
@click.argument("path", type=click.Path(path_type=Path), default="capibara.toml")
@click.option("--preset", default="tiny-cpu", show_default=True, help="development, small or tiny-cpu.")
def init(path: Path, preset: str, as_json: bool) -> None:
    """Write a configuration file to start from.

    PATH is capibara.toml if none is given; an existing file is never overwritten.
    """
    from capibara.core.config import ModularConfig
    from capibara.files import write_new

    write_new(path, ModularConfig.preset(preset).to_toml())
    say(
        as_json,
        {"config": str(path)},
        f"Wrote {path}. Put the folder of your text in [data] path, then:\n"
        f"  capibara config check {path}\n  capibara train {path}",
    )


@command(main, "train")
@click.argument("config_path", metavar="CONFIG", type=str)
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="Run directory (default runs/train-N).")
@click.option("--attack", metavar="NAME[:STRENGTH]", help=ATTACK_HELP)
@SET
@click.option("--print-config", is_flag=True, help="Print every value with its origin, and stop.")
def train(
    config_path: str, run_dir: Path | None, attack: str | None, overrides: tuple[str, ...], print_config: bool,
    as_json: bool,
) -> None:
    """Train by consensus as CONFIG says.

    CONFIG is a TOML file, or the name of a preset: development, small, tiny-cpu. Values are taken from the command
    line, then from CAPIBARA_SECTION__KEY in the environment, then from the file. Every round is committed to the run
    directory, so that a run can be stopped at any moment and resumed.
    """
    loaded = _load(config_path, (*overrides, *([_attack(attack)] if attack else [])))
    if print_config:
        _print_config(loaded, as_json)
        return
    _start_process()
    from capibara.training.session import open_session

    with open_session(loaded, run_dir=run_dir, kind="train", note=note_to(as_json)) as session:
        _run(session, as_json)


@command(main, "resume")
@RUN
def resume(run: Path, as_json: bool) -> None:
    """Go on with a run that was stopped.

    Whether it was interrupted, killed, out of disk or without quorum: it ends as if it had never stopped, with the
    same last hash. A damaged checkpoint is walked past, and the rounds since the one before it are run again.
    """
    _start_process()
    from capibara.training.session import reopen_session

    with reopen_session(run, note=note_to(as_json)) as session:
        _run(session, as_json)


@command(main, "verify")
@RUN
@click.option("--expect", metavar="HASH", help="The hash that the last certificate must have; keep it elsewhere.")
@click.option("--no-replay", is_flag=True, help="Check digests and the chain only, not the votes.")
def verify(run: Path, expect: str | None, no_replay: bool, as_json: bool) -> None:
    """Recheck the certificates, files and votes of a run.

    The chain of certificates, every digest, and every vote whose deltas were kept (keep_deltas = true) are repeated
    from the files alone; whatever does not check is named with its place, and the exit code is 1. Reads only.
    """
    _start_process()
    from capibara.run.report import verify_text
    from capibara.training.replay import verify_run

    report = verify_run(run, expect=expect, replay=not no_replay)
    say(as_json, report.to_json(), verify_text(report))
    sys.exit(0 if report.ok else 1)


@command(main, "generate")
@RUN
@click.option("--prompt", default="\n", help="Text to go on from; a new line if none is given.")
@click.option("--max-tokens", default=200, show_default=True, type=click.IntRange(1), help="How many tokens to write.")
@click.option(
    "--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 always takes the likeliest."
)
@click.option("--top-k", default=None, type=click.IntRange(1), help="Choose among the k likeliest tokens.")
@click.option(
    "--top-p", default=None, type=click.FloatRange(0, 1, min_open=True),
    help="Choose among the likeliest tokens that together have probability p.",
)
@click.option("--seed", default=0, show_default=True, help="The same seed writes the same text.")
@click.option("--weights", metavar="KIND", help="int8 reads the weights rounded to 8 bits, which is faster.")
def generate(
    run: Path, prompt: str, max_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int,
    weights: str | None, as_json: bool,
) -> None:
    """Write text with the model of a run.

    RUN is a run directory, whose newest intact checkpoint is used, or a folder that model.save wrote.
    """
    _start_process()
    from capibara.training.session import load_model

    text = load_model(run).generate(
        prompt, max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        weights=weights,
    )
    say(as_json, {"prompt": prompt, "text": text}, f"{prompt}{text}")


@command(runs, "ls")
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
def runs_ls(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (runs)."""
    from capibara.run.report import describe_runs, runs_text

    found = describe_runs(folder)
    say(as_json, {"runs": found}, runs_text(found, folder))


@command(runs, "show")
@RUN
def runs_show(run: Path, as_json: bool) -> None:
    """Show the rounds of a run, losses, and who was kept out."""
    from capibara.run.report import describe_run, run_text

    description = describe_run(run)
    say(as_json, description, run_text(description))


@command(config, "check")
@click.argument("config_path", metavar="FILE", type=str)
@SET
@click.option("--print-config", is_flag=True, help="Print every value with its origin.")
def config_check(config_path: str, overrides: tuple[str, ...], print_config: bool, as_json: bool) -> None:
    """Check a configuration file.

    Errors name the line, the column and the nearest known name, and end with exit code 2.
    """
    loaded = _load(config_path, overrides)
    if print_config:
        _print_config(loaded, as_json)
    else:
        told = loaded.consensus.describe()
        missing = "" if loaded.data.path else " No text is named yet: training needs data.path."
        say(as_json, {"ok": True, "file": config_path, "consensus": told}, f"{config_path}: good. {told}{missing}")


@command(main, "doctor")
@click.option("--speed", is_flag=True, help="Also measure the CPU against its own peak, in about 20 s.")
def doctor(speed: bool, as_json: bool) -> None:
    """Look at this machine.

    JAX and its devices, memory, disk, versions, and how to install what is missing; exit code 1 where nothing can be
    trained.
    """
    from capibara.run.doctor import doctor_text, examine
    from capibara.runtime import interrupts_wait, prepare_process

    prepare_process()
    with interrupts_wait():
        findings = examine()
    text = doctor_text(findings)
    if speed and not findings["problem"]:
        from capibara.run.speed import measure, speed_text

        findings["speed"] = measure(note=note_to(as_json))
        text += "\n\n" + speed_text(findings["speed"])
    say(as_json, findings, text)
    sys.exit(1 if findings["problem"] else 0)


add_merge(main)


def _start_process() -> None:
    from capibara.runtime import interrupts_wait, prepare_process

    prepare_process()
    with interrupts_wait():
        import capibara.training.session  # noqa: F401


def _attack(name: str) -> str:
    return f"consensus.attack={json.dumps(name)}"  # quoted: `nan` alone would be a number in TOML


def _load(name: str, overrides: tuple[str, ...]) -> Any:
    from capibara.core.config import ModularConfig

    if not name.endswith(".toml") and not Path(name).exists():
        return ModularConfig.preset(name, overrides=overrides)
    return ModularConfig.from_toml(name, overrides=overrides)


def _print_config(loaded: Any, as_json: bool) -> None:
    from capibara.core.toml import render_with_origins

    say(as_json, {"config": loaded.model_dump(mode="json"), "origins": loaded.origins}, render_with_origins(loaded))


def _run(session: Any, as_json: bool, sample: str | None = None) -> None:
    """Runs a session under a live display and prints its result; Ctrl-C saves and says how to resume."""
    from capibara.run.report import result_text

    try:
        with session.display(enabled=not as_json) as display:
            results = session.train(display, sample=sample)
    except KeyboardInterrupt:
        finished = session.save()
        told = f"Saved after round {finished} of {session.num_rounds}." if finished else "No round was finished yet."
        raise click.Abort(f"{told} Go on with: capibara resume {session.run.path}") from None
    say(as_json, results.to_json(), "" if as_json else result_text(results))
