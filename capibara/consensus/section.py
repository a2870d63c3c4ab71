"""`Section`: a frozen group of settings whose every error is one sentence of ours, never one of pydantic's.

    ConsensusConfig(num_node=8)  →  ConfigError: Unknown key 'num_node'. Did you mean 'num_nodes'? Known: …

`ConfigError.details` keeps the keys at fault beside each sentence, so that a file's reader can point at the line.
"""

from __future__ import annotations

from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from capibara.errors import ConfigError, nearest, unknown_name

UNSET = "none"
"""The word that unsets a value in a file, in the environment or on the command line; TOML has none of its own."""


class Section(BaseModel):
    """A frozen group of settings.

    Raises:
      ConfigError: For an unknown key or a value that cannot be meant; one sentence a mistake, all of them at once.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False
    )

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise as_config_error(error, type(self)) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with our errors."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise as_config_error(error, cls) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError:
            raise ConfigError(
                f"{type(self).__name__} is frozen; got {name} = {value!r}. Build a new one with the value you want."
            ) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """`none` unsets what may be unset; true and false are not taken for 1 and 0."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, str) and value == UNSET and may_be_unset(field):
            return None
        kinds = _kinds(field)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"{info.field_name} is a number; got {str(value).lower()}.")
        return value


def setting(default: Any, about: str, **limits: Any) -> Any:
    """A field with its default, one line for the documentation and for files, and pydantic's limits (`ge=1`).

    Type checkers then see a default; of pydantic's own `Field` they see it only where it stands under its keyword.
    """
    return Field(default=default, description=about, **limits)


def may_be_unset(field: FieldInfo) -> bool:
    """Whether None is a value of the field."""
    return field.default is None or type(None) in _kinds(field)


def name_of(part: Any) -> str:
    """The name of a part given by name or as an object."""
    return part if isinstance(part, str) else str(getattr(part, "name", type(part).__name__))


def written(part: Any) -> str:
    """How a file shows a part: a name as it is, an object as `<object Name>`, which cannot be read back."""
    return part if isinstance(part, str) else f"<object {name_of(part)}>"


def check_part(what: str, part: Any, known: tuple[str, ...]) -> None:
    """Lets a name of the vocabulary or an object pass.

    Raises:
      ValueError: For a name that is not there, for the trace of an object in a file, and for plain data.
    """
    if isinstance(part, str):
        if part.startswith("<object "):
            raise ValueError(
                f"{what} was given as an object, {part}, which a file cannot hold. Build the configuration in Python "
                f"and pass the object again, or use a name: {', '.join(sorted(known))}."
            )
        if part not in known:
            raise ValueError(unknown_name(what, part, known))
    elif part is None or type(part) in (bool, int, float, bytes, list, dict, tuple):
        raise ValueError(f"{what} is a name or an object; got {part!r}. Known names: {', '.join(sorted(known))}.")


def as_config_error(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """Pydantic's findings as one `ConfigError`; its `details` are (keys, sentence) pairs: what, got, needed."""
    details: list[tuple[tuple[str, ...], str]] = []
    misfits: dict[tuple[str, ...], tuple[list[str], Any]] = {}
    for found in error.errors():
        keys = _keys(model, found["loc"])
        inner = found.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            details += [((*keys, *more), sentence) for more, sentence in inner.details or [((), str(inner))]]
        elif found["type"] == "extra_forbidden":
            details.append((keys, _unknown_key(keys, field_names(model, found["loc"][:-1]))))
        elif found["type"] == "value_error":
            details.append((keys, str(inner)))
        else:  # one finding for each kind that a field may have
            needed = found["msg"].removeprefix("Input should be ").replace("valid tuple", "list")
            misfits.setdefault(keys, ([], found["input"]))[0].append(needed)
    for keys, (needed, got) in misfits.items():
        details.append((keys, f"{'.'.join(keys) or model.__name__} should be {' or '.join(needed)}; got {got!r}."))
    raised = ConfigError("\n".join(sentence for _, sentence in details))
    raised.details = details
    return raised


def field_names(model: type[BaseModel], path: tuple[Any, ...] = ()) -> list[str]:
    """The keys that a section of a configuration knows."""
    for part in path:
        inner = _section_at(model, part)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _unknown_key(keys: tuple[str, ...], known: list[str]) -> str:
    guess = nearest(keys[-1], known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"Unknown key {'.'.join(keys)!r}.{hint} Known: {', '.join(sorted(known))}."


def _keys(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[str, ...]:
    """The part of a location that a user wrote: down to the field, without pydantic's branches of a union."""
    keys: list[str] = []
    for part in loc:
        keys.append(str(part))
        inner = _section_at(model, part)
        if inner is None:
            break
        model = inner
    return tuple(keys)


def _section_at(model: type[BaseModel], part: Any) -> type[BaseModel] | None:
    field = model.model_fields.get(str(part))
    inner = field.annotation if field else None
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _kinds(field: FieldInfo) -> set[Any]:
    return set(get_args(field.annotation)) or {field.annotation}
