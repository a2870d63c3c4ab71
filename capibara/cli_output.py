"""What all commands share: a result as text or as JSON, and a failure as one sentence and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted (what was committed is kept).
Results go to standard output; progress, and errors in one sentence, to standard error. With `--json` standard output
carries one JSON object, an error's too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from capibara.errors import CapibaraError, ConfigError

INTERRUPTED = 130
"""Exit code of a command that a Ctrl-C ended: 128 and the number of the signal."""

ASCII = str.maketrans({"─": "-", "–": "-", "→": "->", "±": "+-", "…": "...", "θ": "theta", "Δ": "delta", "≥": ">="})
"""For terminals that know no others; whatever else they do not know becomes a question mark."""


class Command(click.Group):
    """A group whose failures are one sentence and one of our exit codes, those that click finds included."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; an interrupt is ours to tell, without the empty line that click puts before it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None

    def main(self, args: Sequence[str] | None = None, *others: Any, **extra: Any) -> NoReturn:
        """Runs the command line and exits; the process's own one, which `args` does not replace, ends the process."""
        given = list(sys.argv[1:] if args is None else args)
        code = self._run(given, "--json" in given, *others, **extra)
        if args is None:
            end_process(code)
        sys.exit(code)

    def _run(self, given: list[str], as_json: bool, *others: Any, **extra: Any) -> int:
        try:
            code = super().main(given, *others, **{**extra, "standalone_mode": False})
        except (click.Abort, KeyboardInterrupt) as error:
            return _fail(f"interrupted: {str(error) or 'Nothing that was on disk is lost.'}", INTERRUPTED, as_json)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return 2
        except click.UsageError as error:
            path = " ".join((error.ctx.command_path if error.ctx else "capibara").split())  # one name may be hidden
            return _fail(f"error: {error.format_message()} See `{path} --help`.", 2, as_json)
        except ConfigError as error:
            return _fail(f"error: {error}", 2, as_json)
        except (CapibaraError, click.ClickException) as error:
            return _fail(f"error: {error}", 1, as_json)
        except ImportError as error:
            return _fail(f"error: {error}. Look for what is missing with `capibara doctor`.", 1, as_json)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            return _fail(f"error: {what}.", 1, as_json)
        return code if isinstance(code, int) else 0


def end_process(code: int) -> NoReturn:
    """Ends the command's process; a Ctrl-C from here on changes nothing, and prints no traceback.

    With code 130, after an interrupt, it ends at once, without the clean-up of libraries and without joining threads:
    XLA may still be compiling in a thread of its own, and crashes when its client is freed meanwhile. What a run has
    committed is on disk by then, as after a kill.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code != INTERRUPTED:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a reader that went away, a stream that is closed
            stream.flush()
    os._exit(code)


def command(group: click.Group, name: str, **kwargs: Any) -> Callable[[Callable], click.Command]:
    """Registers a command with `--json`."""

    def register(body: Callable) -> click.Command:
        option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
        return group.command(name, **kwargs)(option(body))

    return register


def say(as_json: bool, payload: dict[str, Any], text: str) -> None:
    """Prints a result: `payload` as one JSON object, or `text`."""
    from capibara.run.metrics import plain

    _echo(json.dumps(plain(payload), indent=2, default=str, allow_nan=False) if as_json else text)


def note_to(as_json: bool) -> Callable[[str], None] | None:
    """Where sentences go that a user should know while a command runs: standard error; nowhere with `--json`."""
    return None if as_json else lambda text: click.echo(text, err=True)


def _fail(message: str, code: int, as_json: bool) -> int:
    """Tells a failure and gives its exit code back."""
    if as_json:
        _echo(json.dumps({"ok": False, "error": message.removeprefix("error: "), "exit_code": code}))
    else:
        after_the_key = "\n" if code == INTERRUPTED and sys.stderr.isatty() else ""
        _echo(after_the_key + message, err=True)
    return code


def _echo(text: str, err: bool = False) -> None:
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII).encode(encoding, errors="replace").decode(encoding)
    click.echo(text, err=err)
