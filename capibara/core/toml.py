"""Configuration files: TOML in with the line of every mistake, TOML out, and where each value came from.

    error: Unknown key 'batch_sise'. Did you mean 'batch_size'?
      --> run.toml:7:1
      7 | batch_sise = 4
        | ^^^^^^^^^^
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from capibara.consensus.section import UNSET, Section, written
from capibara.core.config import ModularConfig
from capibara.errors import ConfigError, nearest, unknown_name

ENVIRONMENT = "CAPIBARA_"


class Place(NamedTuple):
    """Where a value was written."""

    origin: str
    file: Path | None = None
    line: int = 0
    column: int = 0
    width: int = 1
    text: str = ""


def load(path: Path, overrides: tuple[str, ...], environment: Mapping[str, str] | None = None) -> ModularConfig:
    """The configuration that a file, what it extends, the environment and the command line make together."""
    values, places = _read(path, ())
    for key, raw in sorted((os.environ if environment is None else environment).items()):
        if key.startswith(ENVIRONMENT) and "__" in key:
            _put(values, places, key.removeprefix(ENVIRONMENT).lower().split("__"), raw, f"environment {key}")
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"An override is SECTION.KEY=VALUE; got {override!r}, e.g. training.batch_size=4.")
        _put(values, places, key.strip().split("."), raw.strip(), "command line")
    return _build(values, places)


def preset_path(name: str) -> Path:
    """The packaged file of a preset."""
    path = Path(str(resources.files("capibara.core") / "presets" / f"{name}.toml"))
    if not path.is_file():
        raise ConfigError(unknown_name("preset", name, presets()))
    return path


def presets() -> list[str]:
    """Names of the packaged configurations."""
    return sorted(p.name.removesuffix(".toml") for p in (resources.files("capibara.core") / "presets").iterdir()
                  if p.name.endswith(".toml"))


def plain(config: BaseModel) -> dict[str, Any]:
    """A configuration as TOML types: objects by name, unset values left out."""
    out: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            out[name] = plain(value)
        elif value is not None:
            out[name] = _plain_value(value)
    return out


def dump(config: ModularConfig) -> str:
    """TOML text with every value. Unset ones stand as comments, or as "none" where unset is not the default."""
    import tomlkit

    document = tomlkit.document()
    for section_name in type(config).model_fields:
        section, table = getattr(config, section_name), tomlkit.table()
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if value is None and field.default is None:
                table.add(tomlkit.comment(f"{name} is unset: {field.description}"))
            else:
                item = tomlkit.item(UNSET if value is None else _plain_value(value))
                item.comment(field.description or "")
                table.add(name, item)
        document.add(section_name, table)
    return tomlkit.dumps(document)


def render_with_origins(config: ModularConfig) -> str:
    """Every value and where it comes from, one a line."""
    rows = []
    for section_name in type(config).model_fields:
        section = getattr(config, section_name)
        rows += [
            (f"{section_name}.{name}", _shown(getattr(section, name)),
             config.origins.get(f"{section_name}.{name}")
             or ("default" if getattr(section, name) == field.default else "set in Python"))
            for name, field in type(section).model_fields.items()
        ]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{key:{wide[0]}}  {value:{wide[1]}}  {origin}" for key, value, origin in rows)


def _shown(value: Any) -> str:
    """A value as `--set` takes it."""
    return UNSET if value is None else json.dumps(_plain_value(value), ensure_ascii=False)


def _read(path: Path, seen: tuple[Path, ...], named: Place | None = None) -> tuple[dict[str, Any], dict[str, Place]]:
    """The values of a file over those of what it extends, and where each was written; `named` is what extends it."""
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(_point("extends goes in a circle: " + " → ".join(str(p) for p in (*seen, resolved)), named))
    text = _text(path, named)
    try:
        own = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(str(error), path, text)) from None
    places = _spans(text, path)
    extends = own.pop("extends", [])
    bases, here = [extends] if isinstance(extends, str) else extends, places.pop("extends", None)
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(_point(f"extends is a list of files and presets; got {extends!r}.", here))
    packaged = path.parent == preset_path("tiny-cpu").parent
    own_places = {
        key: place._replace(origin=f"preset {path.stem}" if packaged else f"file {path}:{place.line}")
        for key, place in places.items()
    }
    values, places = {}, {}
    for base in bases:
        if not base.endswith(".toml") and base not in presets():
            raise ConfigError(_point(unknown_name("preset", base, presets()), here))
        base_path = path.parent / base if base.endswith(".toml") else preset_path(base)
        more, more_places = _read(base_path, (*seen, resolved), here)
        values = _merge(values, more)
        places |= more_places
    return _merge(values, own), places | own_places


def _text(path: Path, named: Place | None) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        hint = "" if named else f" `capibara init {path}` writes one."
        raise ConfigError(_point(f"There is no configuration file {path}.{hint}", named)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(_point(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.", named)) from None
    except OSError as error:
        raise ConfigError(_point(f"{path} cannot be read: {error.strerror}. Name a TOML file.", named)) from None


def _syntax_error(message: str, path: Path, text: str) -> str:
    """`tomllib`'s message with its place; Python 3.11 gives the place only in the text."""
    found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    sentence = f"{message[: found.start()] if found else message}."
    if found and found[1]:
        line, column = int(found[1]), int(found[2])
    else:
        line = max(len(text.splitlines()), 1)
        column = len(_line(text, line)) + 1
    return _point(sentence, Place("", path, line, column, 1, _line(text, line)))


def _put(values: dict[str, Any], places: dict[str, Place], keys: list[str], raw: str, origin: str) -> None:
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    inner = values
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(keys)} goes into {key!r}, which is a value and not a section. ({origin})")
    inner[keys[-1]] = value
    places[".".join(keys)] = Place(origin)


def _build(values: dict[str, Any], places: dict[str, Place]) -> ModularConfig:
    sections: dict[str, Any] = {}
    errors: list[tuple[str, Place | None]] = []
    for name, content in values.items():
        field = ModularConfig.model_fields.get(name)
        if field is None:
            guess = nearest(name, ModularConfig.model_fields)
            hint = f" Did you mean {guess!r}?" if guess else ""
            known = ", ".join(ModularConfig.model_fields)
            errors.append((f"Unknown section {name!r}.{hint} Known: {known}.", _place(places, name)))
            continue
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        if not isinstance(content, dict):
            errors.append((f"{name} is a section, not a value or a list; write [{name}].", _place(places, name)))
            continue
        try:
            sections[name] = section(**content)
        except ConfigError as error:
            for keys, sentence in error.details:
                errors.append((sentence, _place(places, ".".join([name, *keys]), sentence)))
    if errors:
        errors.sort(key=lambda found: (found[1].line, found[1].column) if found[1] else (0, 0))
        raise ConfigError("\n".join(_point(sentence, place) for sentence, place in errors))
    config = ModularConfig(**sections)
    known = {f"{s}.{key}" for s in sections for key in sections[s].model_fields_set}
    config._origins.update({key: place.origin for key, place in places.items() if key in known})
    return config


def _place(places: dict[str, Place], key: str, sentence: str = "") -> Place | None:
    """Where `key` was written; for a whole section, the one of its keys that the sentence names first."""
    inside = [k for k in places if k.startswith(f"{key}.")]
    named = {k: re.search(rf"\b{re.escape(k.split('.')[-1])}\b", sentence) for k in inside}
    first = min((found.start(), k) for k, found in named.items() if found) if any(named.values()) else None
    if first:
        return places[first[1]]
    return places.get(key) or (places[inside[0]] if inside else None)


def _point(sentence: str, place: Place | None) -> str:
    if place is None:
        return sentence
    if place.file is None:
        return f"{sentence} ({place.origin})"
    number = str(place.line)
    caret = " " * (place.column - 1) + "^" * max(place.width, 1)
    return (
        f"{sentence}\n  --> {place.file}:{place.line}:{place.column}\n  {number} | {place.text}\n"
        f"  {' ' * len(number)} | {caret}"
    )


def _spans(text: str, path: Path) -> dict[str, Place]:
    """Dotted key → its place in the file, by tree-sitter."""
    import tree_sitter
    import tree_sitter_toml

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language()))
    found: dict[str, Place] = {}

    def name(node: Any) -> list[str]:
        if node.type in ("bare_key", "quoted_key"):
            return [node.text.decode().strip("\"'")]
        return [part for child in node.children for part in name(child)]

    def visit(node: Any, prefix: list[str]) -> None:
        for child in node.children:
            if child.type == "pair":
                keys = [*prefix, *name(child.children[0])]
                value = next((c for c in child.children[2:] if c.type != "comment"), child)
                found[".".join(keys)] = _at(child, text, path, end=value.end_byte)
                if value.type == "inline_table":
                    visit(value, keys)
            elif child.type in ("table", "table_array_element"):
                header = next(c for c in child.children if c.type in ("bare_key", "quoted_key", "dotted_key"))
                found[".".join(name(header))] = _at(header, text, path)
                visit(child, name(header))

    visit(parser.parse(text.encode()).root_node, [])
    return found


def _at(node: Any, text: str, path: Path, end: int | None = None) -> Place:
    row, byte_column = node.start_point
    line = _line(text, row + 1)
    column = len(line.encode()[:byte_column].decode(errors="ignore"))
    written = node.text[: None if end is None else end - node.start_byte]
    width = len(written.decode().splitlines()[0])
    return Place("", path, row + 1, column + 1, width, line)


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number - 1] if 0 < number <= len(lines) else ""


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _plain_value(value: Any) -> Any:
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):  # rules, merges, attacks are NamedTuples
        return [_plain_value(one) for one in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else written(value)
