"""The command `capibara`: parses, calls, prints. No decision about training is taken here.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted (what was committed is kept).
Heavy imports stay inside the commands, so that `capibara --help` answers at once.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from capibara import __version__
from capibara.errors import CapibaraError, ConfigError


def command(group: click.Group, name: str, **kwargs: Any) -> Callable:
    """Registers a command with `--json` and our exit codes."""

    def register(body: Callable) -> click.Command:
        @functools.wraps(body)
        def run(*args: Any, **options: Any) -> None:
            as_json = options["as_json"]
            try:
                body(*args, **options)
            except KeyboardInterrupt:
                _fail("interrupted", "What was committed is on disk.", 130, as_json)
            except ConfigError as error:
                _fail("error", str(error), 2, as_json)
            except CapibaraError as error:
                _fail("error", str(error), 1, as_json)

        run = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(run)
        return group.command(name, **kwargs)(run)

    return register


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="capibara")
def main() -> None:
    """Train language models by consensus: n nodes train, vote, and leave a certificate of every merge."""


@main.group()
def runs() -> None:
    """List and show runs."""


@main.group()
def config() -> None:
    """Check configuration files."""


RUN = click.argument("run", type=click.Path(path_type=Path))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value; may be repeated."
)
ATTACK = click.option("--attack", metavar="NAME[:STRENGTH]", help="Let the last f nodes lie, e.g. scale:-10.")


@command(main, "demo")
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="Run directory (default runs/demo-N).")
@click.option("--attack", default="scale:-10", show_default=True, metavar="NAME[:STRENGTH]", help="How two nodes lie.")
@SET
def demo(run_dir: Path | None, attack: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train eight nodes on presidents' speeches, two of them lying, and show what the vote made of it."""
    _start_process()
    from capibara.training.session import open_session

    changes = ("consensus.keep_deltas=true", f"consensus.attack={attack}", *overrides)
    with open_session(_load("tiny-cpu", changes), run_dir=run_dir, kind="demo") as session:
        _run(session, as_json, sample=True)


@command(main, "init")
@click.argument("path", type=click.Path(path_type=Path), default="capibara.toml")
@click.option("--preset", default="tiny-cpu", show_default=True, help="What to start from.")
def init(path: Path, preset: str, as_json: bool) -> None:
    """Write a configuration file to start from."""
    from capibara.core.config import ModularConfig
    from capibara.files import write_new

    write_new(path, ModularConfig.preset(preset).to_toml())
    _say(as_json, {"config": str(path)}, f"Wrote {path}. Next: put your text's folder in [data] path, then\n"
         f"  capibara config check {path}\n  capibara train {path}")


@command(main, "train")
@click.argument("config_path", metavar="CONFIG", type=str)
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="Run directory (default runs/train-N).")
@ATTACK
@SET
@click.option("--print-config", is_flag=True, help="Print every value with its origin, and stop.")
def train(
    config_path: str, run_dir: Path | None, attack: str | None, overrides: tuple[str, ...], print_config: bool,
    as_json: bool,
) -> None:
    """Train by consensus as CONFIG says (a TOML file, or the name of a preset)."""
    loaded = _load(config_path, (*overrides, *([f"consensus.attack={attack}"] if attack else [])))
    if print_config:
        _print_config(loaded, as_json)
        return
    _start_process()
    from capibara.training.session import open_session

    with open_session(loaded, run_dir=run_dir, kind="train") as session:
        _run(session, as_json)


@command(main, "resume")
@RUN
def resume(run: Path, as_json: bool) -> None:
    """Go on with a run that was interrupted, killed or refused; it ends as if it had never stopped."""
    _start_process()
    from capibara.training.session import reopen_session

    with reopen_session(run) as session:
        _run(session, as_json)


@command(main, "verify")
@RUN
@click.option("--expect", metavar="HASH", help="The hash that the last certificate must have.")
@click.option("--no-replay", is_flag=True, help="Check digests and the chain only, not the votes.")
def verify(run: Path, expect: str | None, no_replay: bool, as_json: bool) -> None:
    """Recheck a run: the chain of certificates, every digest, and every vote whose deltas were kept."""
    _start_process()
    from capibara.run.report import verify_text
    from capibara.training.replay import verify_run

    report = verify_run(run, expect=expect, replay=not no_replay)
    _say(as_json, report.to_json(), verify_text(report))
    sys.exit(0 if report.ok else 1)


@command(main, "generate")
@RUN
@click.option("--prompt", default="\n", help="Text to go on from.")
@click.option("--max-tokens", default=200, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0))
@click.option("--top-k", default=None, type=click.IntRange(1))
@click.option("--top-p", default=None, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True)
def generate(
    run: Path, prompt: str, max_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int,
    as_json: bool,
) -> None:
    """Write text with the model of a run."""
    _start_process()
    from capibara.training.session import load_model

    text = load_model(run).generate(
        prompt, max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    _say(as_json, {"prompt": prompt, "text": text}, f"{prompt}{text}")


@command(runs, "ls")
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
def runs_ls(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER."""
    from capibara.run.report import describe_runs, runs_text

    found = describe_runs(folder)
    _say(as_json, {"runs": found}, runs_text(found, folder))


@command(runs, "show")
@RUN
def runs_show(run: Path, as_json: bool) -> None:
    """Show a run: its rounds, reasons, losses and last hash."""
    from capibara.run.report import describe_run, run_text

    description = describe_run(run)
    _say(as_json, description, run_text(description))


@command(config, "check")
@click.argument("config_path", metavar="FILE", type=str)
@SET
@click.option("--print-config", is_flag=True, help="Print every value with its origin.")
def config_check(config_path: str, overrides: tuple[str, ...], print_config: bool, as_json: bool) -> None:
    """Check a configuration file; errors name the line, the column and the nearest known name."""
    loaded = _load(config_path, overrides)
    if print_config:
        _print_config(loaded, as_json)
    else:
        _say(as_json, {"ok": True, "file": config_path}, f"{config_path}: good. {loaded.consensus.describe()}")


@command(main, "doctor")
def doctor(as_json: bool) -> None:
    """Look at this machine: JAX, devices, memory, disk and the optional packages."""
    _start_process()
    from capibara.run.doctor import doctor_text, examine

    findings = examine()
    _say(as_json, findings, doctor_text(findings))


def _start_process() -> None:
    from capibara.runtime import prepare_process

    prepare_process()


def _load(name: str, overrides: tuple[str, ...]) -> Any:
    from capibara.core.config import ModularConfig

    if not name.endswith(".toml") and not Path(name).exists():
        return ModularConfig.preset(name, overrides=overrides)
    return ModularConfig.from_toml(name, overrides=overrides)


def _print_config(loaded: Any, as_json: bool) -> None:
    from capibara.core.toml import render_with_origins

    _say(as_json, {"config": loaded.model_dump(mode="json"), "origins": loaded.origins}, render_with_origins(loaded))


def _run(session: Any, as_json: bool, sample: bool = False) -> None:
    """Runs a session under a live display and prints its result; Ctrl-C saves and says how to resume."""
    from capibara.run.report import result_text

    try:
        with session.display(enabled=not as_json) as display:
            results = session.train(display, sample="The " if sample else None)
    except KeyboardInterrupt:
        saved = session.save()
        hint = f"Saved after round {saved}. Go on with: capibara resume {session.run.path}"
        _fail("interrupted", hint, 130, as_json)
        return
    if as_json:
        _say(True, results.to_json(), "")
    else:
        _say(False, {}, result_text(results, sample=sample))


def _say(as_json: bool, payload: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(payload, indent=2, default=str) if as_json else text)


def _fail(kind: str, message: str, code: int, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": kind, "message": message, "exit_code": code}))
    click.echo(f"{kind}: {message}", err=True)
    sys.exit(code)
