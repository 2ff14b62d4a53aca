"""One way to read settings: frozen dataclass <- YAML file <- `key=value` overrides; an unknown key is an error."""

import dataclasses
import hashlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from molora.errors import ConfigError

Settings = TypeVar("Settings")
EXTENDS = "extends"


def load_settings(kind: type[Settings], file: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read settings of type `kind`.

    Args:
        kind: a dataclass; its fields may be dataclasses themselves.
        file: a YAML file, or None for the defaults. One that `extends` another file, which lies beside it, has that
            one's settings but for those that it names itself.
        overrides: `key=value` or `part.key=value`, applied in order after the file; values are read as YAML.

    Raises:
        ConfigError: no such file, bad YAML, an unknown or missing key, or a value of the wrong type.
    """
    values = {} if file is None else _read(Path(file))
    for override in overrides:
        _set(values, override)
    return from_mapping(kind, values)


def _read(file: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The settings file {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {file} is not valid YAML: {error}") from error
    if not isinstance(read, dict | None):
        raise ConfigError(f"The settings file {file} must hold `key: value` lines.")
    values = read or {}
    extended = values.pop(EXTENDS, None)
    if extended is None:
        return values
    if not isinstance(extended, str) or Path(extended).name != extended or extended == file.name:
        raise ConfigError(f"The settings file {file} extends {extended!r}, which is no other file beside it.")
    return {**_read(file.parent / extended), **values}


def from_mapping(kind: type[Settings], values: Mapping[str, Any], where: str = "") -> Settings:
    """Build the dataclass `kind` from nested mappings; errors as in `load_settings`. `where` prefixes key names."""
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind} is not a dataclass")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [str(key) for key in values if key not in fields]
    if unknown:
        raise ConfigError(f"Unknown setting {where}{unknown[0]}; there are: {', '.join(where + n for n in fields)}.")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"The setting {where}{name} holds settings of its own, not {value!r}.")
            given = {**_unlike_its_kind(fields[name]), **value}
            arguments[name] = from_mapping(typing.cast(type, hint), given, where=f"{where}{name}.")
        else:
            arguments[name] = _convert(value, hint, where + name)
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in arguments:
            raise ConfigError(f"The setting {where}{name} is missing.")
    return kind(**arguments)


def _unlike_its_kind(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    """What a field's default sets otherwise than its dataclass does: it holds where only some of it is given."""
    if field.default_factory is dataclasses.MISSING:
        return {}
    own = field.default_factory()
    plain = type(own)()
    values = {one.name: getattr(own, one.name) for one in dataclasses.fields(own)}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"The override {override!r} must look like key=value.")
    *parts, last = key.split(".")
    for part in parts:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"The setting {part} in {override!r} holds no settings of its own.")
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value in {override!r} is not valid YAML.") from error


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as `hint`; only changes that lose nothing (int to float, list to tuple, '1e-4' to float)."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _convert(value, option, key)
            except ConfigError:
                continue
    elif origin is typing.Literal:
        if value in inner:
            return value
        raise ConfigError(f"The setting {key} must be one of {', '.join(map(repr, inner))}, not {value!r}.")
    elif origin in (list, tuple):
        if isinstance(value, list | tuple):
            return origin(_convert(item, inner[0], key) for item in value)
    elif origin is dict:
        if isinstance(value, dict):
            return {_convert(k, inner[0], key): _convert(v, inner[1], key) for k, v in value.items()}
    elif hint in (Any, None, types.NoneType):
        if hint is Any or value is None:
            return value
    elif hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        # YAML reads 1e-4 as text: it wants 1.0e-4.
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"The setting {key} must be {getattr(hint, '__name__', hint)}, not {value!r}.")


def work_folder(kind: str, out: Path) -> Path:
    """Where a training keeps checkpoints and curves: under `runs/`, named for its result, each result its own."""
    place = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
    return Path("runs") / kind / f"{out.name}-{place}"
