"""The documentation is true: links resolve, examples run, every command and option it names exists.

A fenced `python` block runs when the comment `<!-- run -->` stands before it; the blocks of one file share their names,
as a reader's session would. Examples in docstrings run too.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import key_tables
import pytest

from capibara.cli import main
from capibara.consensus.vocabulary import MERGES, VOTES
from capibara.core.config import ModularConfig

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = ("node_modules", "build", "dist", "runs")

FENCE = re.compile(r"^(?P<mark>`{3,})(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=mark)[ \t]*$", re.M | re.S)
RUN = re.compile(r"<!-- run -->\s*$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")


def documents() -> list[Path]:
    """Every Markdown file of the project, outside environments and outputs."""
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(part.startswith(".") or part in SKIPPED for part in path.relative_to(ROOT).parts)
    ]


def runnable(text: str) -> Iterator[tuple[int, str]]:
    """First line and source of each `python` block that is marked to run."""
    for match in FENCE.finditer(text):
        if match["language"] == "python" and RUN.search(text[: match.start()]):
            yield text.count("\n", 0, match.start("body")), match["body"]


def anchors(text: str) -> set[str]:
    """What a link after # may name: headings in small letters, without punctuation, spaces as hyphens."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> Iterator[str]:
    """Every `capibara …` command line in a shell block or between backticks, without comments and pipes."""
    blocks = [match["body"] for match in FENCE.finditer(text) if match["language"] != "python"]
    lines = [line for block in blocks for line in block.split("\n")]
    lines += INLINE.findall(FENCE.sub("", text))
    for line in lines:
        line = re.split(r"\s#|[|>&;]", line.strip().removeprefix("$ ").removeprefix(".venv/bin/"))[0].strip()
        if re.match(r"capibara\s+[a-z-]", line):
            yield line


def examples() -> list[str]:
    """Modules whose docstrings hold examples."""
    paths = [path for path in sorted((ROOT / "capibara").rglob("*.py")) if ">>> " in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


SLOW = ("README.md", "docs/extend.md", "docs/python.md")
"""They train whole runs, most of it compilation."""

DOCUMENTS = {str(path.relative_to(ROOT)): path for path in documents()}
WITH_CODE = [name for name, path in DOCUMENTS.items() if any(runnable(path.read_text()))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name: str):
    text = FENCE.sub("", DOCUMENTS[name].read_text())
    targets = [target for target in LINK.findall(text) if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in targets if not (DOCUMENTS[name].parent / target.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_anchors_are_headings(name: str):
    links = LINK.findall(FENCE.sub("", DOCUMENTS[name].read_text()))
    targets = [target.split("#") for target in links if "#" in target]
    folder = DOCUMENTS[name].parent
    ours = [(folder / file if file else DOCUMENTS[name], anchor) for file, anchor in targets if ":" not in file]
    assert not [(path.name, anchor) for path, anchor in ours if anchor not in anchors(path.read_text())]


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert not pages - set(LINK.findall(index))


def test_the_tables_of_keys_are_those_of_the_configuration():
    page = key_tables.PAGE.read_text()
    sections = [match["section"] for match in key_tables.MARKED.finditer(page)]
    assert sections == list(ModularConfig.model_fields)
    assert key_tables.render(page) == page, "out of date; run: python tests/key_tables.py"


def explanations() -> str:
    """All pages but the one whose tables are rendered."""
    return "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if path != key_tables.PAGE)


def test_every_vote_and_merge_is_explained():
    text = explanations()
    assert not [name for name in (*VOTES, *MERGES) if f"`{name}`" not in text]


def test_every_command_and_option_is_explained():
    text = explanations()

    def missing(command: click.Command, path: str) -> Iterator[str]:
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from missing(inner, path if name == getattr(command, "default", None) else f"{path} {name}")
        elif f"`{path}" not in text:
            yield path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not any(f"`{option}" in text for option in parameter.opts):
                yield f"{path} {parameter.opts[0]}"

    assert not list(missing(main, "capibara"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist(name: str):
    for line in commands(DOCUMENTS[name].read_text()):
        command: click.Command = main
        words = line.split()[1:]
        while words and isinstance(command, click.Group) and not words[0].startswith("-"):
            default = getattr(command, "default", None)
            known = words[0] in command.commands
            assert known or default, f"{line!r}: no command {words[0]!r}"
            command = command.commands[words.pop(0) if known else default]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        options |= {"--help", "-h"}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.split("=")[0] not in options]
        assert not unknown, f"{line!r}: no option {unknown[0]!r}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", DOCUMENTS[name].read_text(), re.M)
    assert not [target for target in named if target not in targets]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in WITH_CODE])
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, source in runnable(DOCUMENTS[name].read_text()):
        tree = ast.increment_lineno(ast.parse(source), line)  # a traceback then shows the line of the document
        exec(compile(tree, str(DOCUMENTS[name]), "exec"), names)


@pytest.mark.parametrize("name", examples())
def test_docstring_examples_run(name: str):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def test_nothing_of_this_machine_is_in_the_files():
    """No absolute path of a home or work folder stands in a text of the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile("/(?:" + "|".join(("home", "root", "Users", "work")) + r")/\w")
    found = []
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".jsonl", "") and path.is_file():
            found += [name for line in path.read_text(errors="replace").split("\n") if pattern.search(line)]
    assert not found
