"""Configuration files: TOML in with the line of every mistake, TOML out, and where each value came from.

    error: Unknown key 'batch_sise'. Did you mean 'batch_size'?
      --> run.toml:7:1
      7 | batch_sise = 4
        | ^^^^^^^^^^
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from capibara.consensus.config import Section, name_of
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
    """TOML text with every value; unset ones stand as comments."""
    import tomlkit

    document = tomlkit.document()
    for section_name in type(config).model_fields:
        section, table = getattr(config, section_name), tomlkit.table()
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if value is None:
                table.add(tomlkit.comment(f"{name} is unset: {field.description}"))
            else:
                item = tomlkit.item(_plain_value(value))
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
            (f"{section_name}.{name}", str(_plain_value(getattr(section, name))),
             config.origins.get(f"{section_name}.{name}", "default"))
            for name in type(section).model_fields
        ]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{key:{wide[0]}}  {value:{wide[1]}}  {origin}" for key, value, origin in rows)


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Place]]:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError("extends goes in a circle: " + " → ".join(str(p) for p in (*seen, resolved)))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {path}. `capibara init {path}` writes one.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    try:
        own = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        message = re.sub(r" \(at .*\)$", "", str(error))
        if found is None:
            raise ConfigError(f"{path}: {message} (at the end of the file).") from None
        line, column = int(found[1]), int(found[2])
        raise ConfigError(_point(f"{message}.", Place("", path, line, column, 1, _line(text, line)))) from None
    extends = own.pop("extends", [])
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for base in [extends] if isinstance(extends, str) else extends:
        base_path = path.parent / base if str(base).endswith(".toml") else preset_path(str(base))
        more, more_places = _read(base_path, (*seen, resolved))
        values = _merge(values, more)
        places |= more_places
    packaged = path.parent == preset_path("tiny-cpu").parent
    for key, place in _spans(text, path).items():
        origin = f"preset {path.stem}" if packaged else f"file {path}:{place.line}"
        places[key] = place._replace(origin=origin)
    return _merge(values, own), places


def _put(values: dict[str, Any], places: dict[str, Place], keys: list[str], raw: str, origin: str) -> None:
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if raw.lower() in ("none", "null") else raw
    inner = values
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{origin}: {'.'.join(keys)} goes into {key!r}, which is a value and not a section.")
    inner[keys[-1]] = value
    places[".".join(keys)] = Place(origin)


def _build(values: dict[str, Any], places: dict[str, Place]) -> ModularConfig:
    sections: dict[str, Any] = {}
    errors: list[str] = []
    for name, content in values.items():
        field = ModularConfig.model_fields.get(name)
        if field is None:
            guess = nearest(name, ModularConfig.model_fields)
            hint = f" Did you mean {guess!r}?" if guess else ""
            known = ", ".join(ModularConfig.model_fields)
            errors.append(_point(f"Unknown section {name!r}.{hint} Known: {known}.", _place(places, name)))
            continue
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        if not isinstance(content, dict):
            errors.append(_point(f"{name} is a section, not a value.", _place(places, name)))
            continue
        try:
            sections[name] = section(**content)
        except ConfigError as error:
            for keys, sentence in error.details:
                errors.append(_point(sentence, _place(places, ".".join([name, *keys]), sentence)))
    if errors:
        raise ConfigError("\n".join(errors))
    config = ModularConfig(**sections)
    known = {f"{s}.{key}" for s in sections for key in sections[s].model_fields_set}
    config._origins.update({key: place.origin for key, place in places.items() if key in known})
    return config


def _place(places: dict[str, Place], key: str, sentence: str = "") -> Place | None:
    """Where `key` was written; for a whole section, the first of its keys that the sentence names."""
    named = [k for k in places if k.startswith(f"{key}.") and re.search(rf"\b{k.split('.')[-1]}\b", sentence)]
    return places[named[0]] if named else places.get(key)


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
                found[".".join(keys)] = _at(child, text, path)
                if child.children[-1].type == "inline_table":
                    visit(child.children[-1], keys)
            elif child.type in ("table", "table_array_element"):
                header = next(c for c in child.children if c.type in ("bare_key", "quoted_key", "dotted_key"))
                found[".".join(name(header))] = _at(header, text, path)
                visit(child, name(header))

    visit(parser.parse(text.encode()).root_node, [])
    return found


def _at(node: Any, text: str, path: Path) -> Place:
    row, byte_column = node.start_point
    line = _line(text, row + 1)
    column = len(line.encode()[:byte_column].decode(errors="ignore"))
    width = len(node.text.decode().splitlines()[0])
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
    if isinstance(value, (tuple, list)):
        return [_plain_value(one) for one in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else f"<object {name_of(value)}>"
