"""`capibara merge`: merges checkpoints, shows one, compares two. Parses and prints; `capibara.merge` does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from capibara.cli_output import command, say
from capibara.errors import ConfigError

SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class MergeGroup(click.Group):
    """`merge A B -o C` is a command, beside `merge inspect` and `merge diff`; a folder of that name is `./inspect`.

    Attributes:
      default: Name of the command that needs no name.
    """

    default = "files"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the command that merges before arguments that name no other."""
        return super().parse_args(ctx, args if args and args[0] in ("inspect", "diff") else [self.default, *args])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Hides the name of the command that merges from its own help."""
        name, found, rest = super().resolve_command(ctx, args)
        return (None if name == self.default else name), found, rest


class FilesCommand(click.Command):
    """The command that merges; its help lists the others too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then the commands beside it."""
        super().format_options(ctx, formatter)
        group = ctx.parent.command if ctx.parent else None
        if isinstance(group, click.Group):
            others = [(name, one) for name, one in group.commands.items() if one is not self]
            rows = [(f"{name} …", one.get_short_help_str(70)) for name, one in others]
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def add_merge(main: click.Group) -> None:
    """Adds the commands to `capibara`."""

    @main.group("merge", cls=MergeGroup)
    def group() -> None:
        """Merge checkpoints larger than memory; show one; compare two."""

    path = click.Path(path_type=Path, readable=False)  # what cannot be read is told by what reads it

    @command(group, "files", cls=FilesCommand)
    @click.argument("inputs", nargs=-1, type=path)
    @click.option("-o", "--out", type=path, required=True, help="A folder to be made, or a .safetensors file.")
    @click.option("--method", help="How (default uniform); the names are listed above.")
    @click.option("--recipe", type=path, help="A recipe.toml instead of inputs and options.")
    @click.option("--weights", metavar="W,W,…", help="One for each input, summing to 1; then --method is weighted.")
    @click.option("--base", type=path, help="What the inputs are fine-tunes of, for methods on task vectors.")
    @click.option("--option", "options", multiple=True, metavar="NAME=NUMBER", help="A number of the method's own.")
    @click.option("--faulty", type=int, help="f, inputs that may be arbitrary (default: a third of them).")
    @click.option("--validation", type=path, help="Text to find the weights on, with a bound on how good they are.")
    @click.option("--dtype", help="float32, bfloat16, float16 or float64 (default: the inputs').")
    @click.option("--stochastic-rounding", is_flag=True, help="Round to 16 bits without bias.")
    @click.option("--seed", type=int, help="Of everything random (default 0).")
    @click.option("--shard-size", metavar="SIZE", help="Most bytes of one file, e.g. 5GB, if no tensor is larger.")
    @click.option(
        "--vocabulary-map", "maps", multiple=True, metavar="I=FILE",
        help="For input I (from 0): a JSON list with its row, or null, for each row of the first input's vocabulary.",
    )  # fmt: skip
    def files(inputs: tuple[Path, ...], out: Path, recipe: Path | None, as_json: bool, **given: Any) -> None:
        """Merge two or more checkpoints into OUT.

        Inputs may be .safetensors files, index files, .npz files, Hugging Face folders, folders that capibara saved,
        runs, and Orbax checkpoints. They are read once or twice from front to back; memory stays small. A merge that
        is killed goes on with the same command. Configuration and tokenizer are the first input's.

        Methods: uniform, weighted, slerp, karcher, rda, median, trimmed_mean, geometric_median, byzantine_tolerant,
        centered_clipping, krum, multi_krum; with --base also task_arithmetic, ties, ties_tensor, dare, dare_norm,
        dare_ties, della, breadcrumbs, model_stock, model_stock_whole, sce.
        """
        from capibara.merge.inspect import readable
        from capibara.merge.merge import merge
        from capibara.merge.meter import Meter
        from capibara.merge.recipe import read_recipe

        if recipe is not None:
            extra = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
            if inputs or extra:
                raise ConfigError(
                    f"A recipe says everything; leave out {'the inputs' if inputs else extra[0]}, or the recipe."
                )
        asked = read_recipe(recipe) if recipe is not None else _recipe(inputs, given)
        try:
            with Meter(enabled=not as_json) as meter:
                report = merge(asked, out, progress=meter)
        except KeyboardInterrupt:
            raise click.Abort("What has been merged is kept. The same command goes on.") from None
        record = report.record
        lines = []
        for entry in record["inputs"]:
            share = entry.get("weight", entry.get("coefficient"))
            number = "" if share is None else f"  {share:.4f}"
            reason = entry.get("reason", "backed")
            lines.append(f"  {entry['path']}{number}" + ("" if reason == "backed" else f"  {reason.replace('_', ' ')}"))
        head = "was merged before" if report.found else "merged"
        went_on = f", {report.resumed} tensors of them by an earlier command" if report.resumed else ""
        lines.insert(0, f"{head} by {record['method']}: {record['parameters']:,} parameters{went_on}")
        if "validation" in record:
            lines += ["", record["validation"]["summary"], ""]
        size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.glob("*.safetensors")))
        lines.append(f"Wrote {out} ({readable(size)}), digest {record['digest']}")
        say(as_json, {"out": str(out), "resumed": report.resumed, "found": report.found, **record}, "\n".join(lines))

    @command(group, "inspect")
    @click.argument("checkpoint", type=path)
    @click.option("--digests", is_flag=True, help="Read it all for the digests of its tensors.")
    def inspect_command(checkpoint: Path, digests: bool, as_json: bool) -> None:
        """Show what a checkpoint holds; only its headers are read."""
        from capibara.merge.inspect import inspect, inspect_text
        from capibara.merge.meter import Meter

        with Meter(enabled=not as_json) as meter:
            found = inspect(checkpoint, digests=digests, progress=meter)
        say(as_json, found, inspect_text(found))

    @command(group, "diff")
    @click.argument("a", type=path)
    @click.argument("b", type=path)
    def diff_command(a: Path, b: Path, as_json: bool) -> None:
        """Compare two checkpoints, tensor by tensor. Exit code 1 where they differ."""
        from capibara.merge.inspect import diff, diff_text
        from capibara.merge.meter import Meter

        with Meter(enabled=not as_json) as meter:
            found = diff(a, b, progress=meter)
        say(as_json, found, diff_text(found))
        sys.exit(0 if found["equal"] else 1)


def _recipe(inputs: tuple[Path, ...], given: dict[str, Any]) -> Any:
    from capibara.merge.recipe import Recipe

    weights, method = given["weights"], given["method"]
    shares = None if weights is None else tuple(_number(part, "--weights") for part in weights.split(","))
    return Recipe(
        inputs=inputs,
        method=method or ("uniform" if shares is None else "weighted"),
        weights=shares,
        base=given["base"],
        faulty=given["faulty"],
        dtype=given["dtype"],
        stochastic_rounding=given["stochastic_rounding"],
        seed=given["seed"] or 0,
        shard_size=None if given["shard_size"] is None else _size(given["shard_size"]),
        vocabulary_maps={int(_number(i, "--vocabulary-map")): Path(file) for i, file in _pairs(given, "maps")},
        options={name: _number(value, "--option") for name, value in _pairs(given, "options")},
        validation=given["validation"],
    )


def _pairs(given: dict[str, Any], key: str) -> list[tuple[str, str]]:
    pairs = [one.partition("=") for one in given[key]]
    for name, sign, value in pairs:
        if not sign or not name or not value:
            raise ConfigError(f"{'--vocabulary-map' if key == 'maps' else '--option'} is NAME=VALUE; got {name!r}.")
    return [(name, value) for name, _, value in pairs]


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option} takes numbers; got {text!r}.") from None


def _size(text: str) -> int:
    unit = SIZES.get(text[-2:].lower())
    try:
        return int(float(text[:-2] if unit else text) * (unit or 1))
    except (ValueError, OverflowError):
        raise ConfigError(f"--shard-size is bytes, or a number with KB, MB, GB or TB; got {text!r}.") from None
