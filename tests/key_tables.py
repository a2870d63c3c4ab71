"""The tables of docs/configuration.md, rendered from the configuration's own fields.

    python tests/key_tables.py     writes them into the page; tests/test_docs.py fails where they are out of date
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from capibara.consensus import vocabulary
from capibara.consensus.section import UNSET, Section, may_be_unset
from capibara.core.config import BLOCK_KINDS, ModularConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

MARKED = re.compile(r"(?<=<!-- keys: )(?P<section>\w+)(?P<head> -->\n)(?P<table>.*?)(?=<!-- end -->)", re.S)

NAMES = {
    "attack": vocabulary.ATTACKS,
    "blocks": BLOCK_KINDS,
    "engine": vocabulary.ENGINES,
    "inner_state": vocabulary.INNER_STATES,
    "merge_rows": vocabulary.MERGE_ROWS,
    "merge_strategy": vocabulary.MERGES,
    "outer": vocabulary.OUTERS,
    "split": ("iid", "by_field", "dirichlet:GAMMA"),
    "strategies": vocabulary.STRATEGIES,
    "voting_strategy": vocabulary.VOTES,
}
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def render(page: str) -> str:
    """The page with every marked table as the fields are now."""

    def table(match: re.Match[str]) -> str:
        section = ModularConfig.model_fields[match["section"]].annotation
        assert isinstance(section, type) and issubclass(section, Section)
        rows = [row(name, field) for name, field in section.model_fields.items()]
        return f"{match['section']}{match['head']}" + "\n".join([*HEAD, *rows]) + "\n"

    return MARKED.sub(table, page)


HEAD = ("| key | default | values | meaning |", "|---|---|---|---|")


def row(name: str, field: FieldInfo) -> str:
    """One key as a row of a table."""
    default = UNSET if field.default is None else json.dumps(field.default, ensure_ascii=False)
    return f"| `{name}` | `{default}` | {values(name, field)} | {field.description} |"


def values(name: str, field: FieldInfo) -> str:
    """What a key may be: names, or a kind with its limits."""
    unset = f", or `{UNSET}`" if may_be_unset(field) else ""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if name in NAMES or get_origin(field.annotation) is Literal:
        told = ", ".join(f"`{known}`" for known in NAMES.get(name, kinds))
        return f"{'list of ' if isinstance(field.default, tuple) else ''}{told}{unset}"
    limits = [
        f"{sign} {getattr(found, limit)}"
        for found in field.metadata
        for limit, sign in LIMITS.items()
        if getattr(found, limit, None) is not None
    ]
    told = " or ".join(
        f"list of {KINDS[get_args(kind)[0]]}s" if get_origin(kind) is tuple else KINDS[kind] for kind in kinds
    )
    return " ".join([told, ", ".join(limits)]).strip() + unset


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
