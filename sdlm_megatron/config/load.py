"""Strict configuration: YAML files and `--a.b=c` into dataclasses; an error on an unknown key names the nearest one."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdlm_megatron.config.explain import settings_of
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.files import write_text

PRESETS = Path(__file__).parent / "presets"
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
"""Types of settings in the words of an error message."""
T = TypeVar("T")


def load_config(schema: type[T], source: str, overrides: Sequence[str] = (), presets: Path | None = None) -> T:
    """Fills `schema` from a YAML file or a preset, then from `--a.b=c` overrides.

    A file may start from another one with `extends: NAME`, a preset or a path relative to the file. An empty `source`
    starts from the schema's defaults. Raises ConfigError on unknown keys, wrong types and unreadable files.
    """
    # OmegaConf knows the types of the fields and checks every value that is merged.
    merged = OmegaConf.structured(schema)
    for file, content in _chain(source, presets):
        _check_keys(schema, content, file)
        merged = _merge(merged, OmegaConf.create(content), file)
    for override in overrides:
        key, value = _split_override(override)
        where = f"the command line, {override}"
        head, _, rest = key.partition(".")
        if rest and head in merged and isinstance(merged[head], ListConfig):
            _set_entry(merged[head], head, rest, value, where)
            continue
        _check_keys(schema, _nested(key, value), where)
        merged = _merge(merged, OmegaConf.create(_nested(key, value)), where)
    return cast(T, OmegaConf.to_object(merged))


def preset_names(presets: Path) -> list[str]:
    """Names of the presets in a folder."""
    return sorted(p.stem for p in presets.glob("*.yaml"))


def to_yaml(config: Any) -> str:
    """A configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_config(config: RunConfig, path: Path) -> None:
    """Writes a configuration as YAML."""
    write_text(path, to_yaml(config))


def _chain(source: str, presets: Path | None) -> list[tuple[str, dict]]:
    """Path and content of the file and of those it extends, the base first."""
    chain: list[tuple[str, dict]] = []
    name, folder = source, Path.cwd()
    while name:
        file = _locate(name, folder, presets)
        if any(str(file) == earlier for earlier, _ in chain):
            raise ConfigError(f"{file} extends itself", str(file), "remove the cycle of `extends`")
        content = _read_yaml(file)
        chain.append((str(file), content))
        name, folder = content.pop("extends", ""), file.parent
    return chain[::-1]


def _locate(name: str, folder: Path, presets: Path | None) -> Path:
    # A file wins over a preset of the same name, so that a preset added later changes no existing command.
    candidates = [folder / name] + ([presets / f"{name}.yaml"] if presets else [])
    for file in candidates:
        if file.is_file():
            return file
    known = preset_names(presets) if presets else []
    near = difflib.get_close_matches(name, known, 1)
    fix = f"did you mean {near[0]}?" if near else f"name a YAML file{' or one of ' + ', '.join(known) if known else ''}"
    raise ConfigError(f"no config file or preset named {name}", os.fspath(candidates[0]), fix)


def _read_yaml(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the file is not readable YAML: {error}", str(file)) from None
    if content is not None and not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"the file contains a {kind}, not settings", str(file), "write `section: {key: value}`")
    return content or {}


def _split_override(override: str) -> tuple[str, Any]:
    if not override.startswith("--") or "=" not in override:
        raise ConfigError(f"cannot read the argument {override}", "the command line", "write --section.key=value")
    key, text = override[2:].split("=", 1)
    try:
        # `--key=` sets an empty string; YAML alone would make it null.
        return key, yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value of {key}: {error}", f"the command line, {override}") from None


def _nested(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _check_keys(schema: Any, content: dict, where: str, head: str = "") -> None:
    """Raises ConfigError on the first key that is not in the schema."""
    # OmegaConf refuses unknown keys too, but its message names neither the file nor the nearest setting.
    known = {f.name: f.type for f in fields(schema)}
    for key, value in content.items():
        if key not in known:
            near = _nearest(schema, key, head)
            fix = f"did you mean {near}?" if near else f"known settings: {', '.join(known)}"
            raise ConfigError(f"unknown setting {head}{key}", where, fix)
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{head}{key} is a section, not a value", where, f"write {head}{key}.NAME=VALUE")
            _check_keys(known[key], value, where, f"{head}{key}.")


def _nearest(schema: Any, key: str, head: str) -> str:
    """The setting that was probably meant: the same name in another section, or a similar spelling."""
    settings = [setting.key for setting in settings_of(schema, head)]
    sections = [f"{head}{f.name}" for f in fields(schema)]
    # `--lr=1e-4` means optimizer.lr: a name without its section is the most frequent mistake.
    same = [k for k in settings if k.rsplit(".", 1)[-1] == key]
    return (same or difflib.get_close_matches(f"{head}{key}", [*settings, *sections], 1, 0.4) or [""])[0]


def _set_entry(entries: ListConfig, head: str, rest: str, value: Any, where: str) -> None:
    """Sets a setting of one entry of a list: `rest` is NAME.KEY or NUMBER.KEY."""
    entry, _, key = rest.partition(".")
    names = [str(item.get("name", i)) for i, item in enumerate(entries)]
    if entry not in names and not (entry.isdigit() and int(entry) < len(names)):
        near = difflib.get_close_matches(entry, names, 1)
        fix = f"did you mean {head}.{near[0]}?" if near else f"known entries: {', '.join(names) or 'none'}"
        raise ConfigError(f"{head} has no entry {entry}", where, fix)
    if not key:
        raise ConfigError(f"{head}.{entry} is a section, not a value", where, f"write {head}.{entry}.NAME=VALUE")
    number = names.index(entry) if entry in names else int(entry)
    schema = OmegaConf.get_type(entries[number])
    _check_keys(schema, _nested(key, value), where, f"{head}.{entry}.")
    entries[number] = _merge(entries[number], OmegaConf.create(_nested(key, value)), where)


def _merge(base: DictConfig, new: DictConfig, where: str) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(base, new))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a setting"
        kinds = {setting.key: setting.type for setting in settings_of(cast(type, OmegaConf.get_type(base)))}
        if key in kinds:
            what = f"{key} is {OmegaConf.select(new, key)!r}, not {TYPES.get(kinds[key], kinds[key])}"
            raise ConfigError(what, where, f"set {key} to {TYPES.get(kinds[key], kinds[key])}") from None
        reason = str(error.args[0]).splitlines()[0]  # the other lines are OmegaConf's own view of the position
        raise ConfigError(f"{key}: {reason}", where, "see --help for the type of each setting") from None
