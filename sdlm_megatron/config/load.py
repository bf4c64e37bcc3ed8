"""Strict configuration: YAML files and `--a.b=c` into dataclasses; an error on an unknown key names the nearest one."""

import difflib
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sdlm_megatron.config.explain import settings_of
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.secret_text import mask_values
from sdlm_megatron.config.yaml_settings import (
    COMMAND_LINE,
    Override,
    entries,
    place_of,
    read_list,
    read_section,
    read_yaml,
    scalar,
    shown,
)
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.files import write_text

PRESETS = Path(__file__).parent / "presets"
T = TypeVar("T")


def load_config(schema: type[T], source: str, overrides: Sequence[str] = (), presets: Path | None = None) -> T:
    """Fills `schema` from a YAML file or a preset, then from `--a.b=c` overrides.

    A file may start from another one with `extends: NAME`, a preset or a path relative to the file. An empty `source`
    starts from the schema's defaults. Lists are replaced, sections and env are merged. Raises ConfigError on unknown
    keys, wrong types, values with two readings, and unreadable files.
    """
    config = schema()
    for settings in _chain(source, presets):
        _fill(config, settings)
    for override in overrides:
        _set(config, override)
    return config


def preset_names(presets: Path) -> list[str]:
    """Names of the presets in a folder."""
    return sorted(p.stem for p in presets.glob("*.yaml"))


def to_yaml(config: Any) -> str:
    """A configuration as YAML that `load_config` reads back, except for secrets: they are masked, and refused there."""
    return yaml.safe_dump(mask_values(asdict(config)), sort_keys=False, allow_unicode=True)


def save_config(config: RunConfig, path: Path) -> None:
    """Writes a configuration as YAML."""
    write_text(path, to_yaml(config))


def expand_variables(local_dir: str) -> str:
    """checkpoint.local_dir with this node's values of $NAME and ${NAME}. ConfigError names a variable without one."""
    folder = os.path.expandvars(local_dir)
    if "$" in folder:
        fix = "set the variable on every node, or write the folder without it"
        raise ConfigError(
            f"a variable of {local_dir} has no value on {os.uname().nodename}", "checkpoint.local_dir", fix
        )
    return folder


def _chain(source: str, presets: Path | None) -> list[yaml.MappingNode]:
    """Settings of the file and of those it extends, the base first."""
    chain: list[yaml.MappingNode] = []
    files: list[Path] = []
    name, folder = source, Path.cwd()
    while name:
        file = _locate(name, folder, presets)
        if file.resolve() in files:
            raise ConfigError(f"{file} extends itself", str(file), "remove the cycle of `extends`")
        files.append(file.resolve())
        name, folder = "", file.parent
        if settings := read_yaml(file):
            chain.append(settings)
            name = next((scalar(node, str, key) for key, node in entries(settings) if key == "extends"), "")
    return chain[::-1]


def _locate(name: str, folder: Path, presets: Path | None) -> Path:
    # A file wins over a preset of the same name, so that a preset added later changes no existing command.
    candidates = [folder / name] + ([presets / f"{name}.yaml"] if presets else [])
    try:
        for file in candidates:
            if file.is_file():
                return file
        if candidates[0].is_dir():
            raise ConfigError(f"{shown(name)} is a folder", os.fspath(candidates[0]), "name the YAML file in it")
    except OSError:  # a name of too many characters, or a folder without permission
        pass
    known = preset_names(presets) if presets else []
    near = difflib.get_close_matches(name, known, 1) if len(name) < 100 else []
    fix = f"did you mean {near[0]}?" if near else f"name a YAML file{' or one of ' + ', '.join(known) if known else ''}"
    raise ConfigError(f"no config file or preset named {shown(name)}", shown(os.fspath(candidates[0])), fix)


def _fill(config: Any, node: yaml.Node, head: str = "", root: type | None = None) -> None:
    """Sets the settings of a section in the dataclass `config`; `head`: its dotted name with a dot at the end.

    `root`: schema of all sections, for messages; None: that of `config`.
    """
    root = root or type(config)
    kinds = typing.get_type_hints(type(config))
    for key, value in entries(read_section(node, head), head):
        if key == "extends" and not head and not isinstance(value, Override):
            continue
        if key not in kinds:
            raise _unknown(type(config), key, value, head, root)
        kind, name, current = kinds[key], f"{head}{key}", getattr(config, key)
        parts = typing.get_args(kind)
        if is_dataclass(kind):
            _fill(current, value, f"{name}.", root)
        elif isinstance(current, dict):
            pairs = entries(read_section(value, f"{name}."), f"{name}.")
            current.update({inner: scalar(text, str, f"{name}.{inner}") for inner, text in pairs})
        elif typing.get_origin(kind) is list:
            items = enumerate(read_list(value, name))
            setattr(config, key, [_entry(item, parts[0], f"{name}[{i}]", root) for i, item in items])
        else:
            setattr(config, key, scalar(value, kind, name))


def _entry(node: yaml.Node, kind: Any, name: str, root: type) -> Any:
    """One entry of a list setting."""
    if not is_dataclass(kind):
        return scalar(node, kind, name)
    entry = typing.cast(type, kind)()
    _fill(entry, node, f"{name}.", root)
    return entry


def _unknown(schema: type, key: str, node: yaml.Node, head: str, root: type) -> ConfigError:
    # the whole name of a command line's setting: of --trian.steps, `trian` is no more than a part
    while isinstance(node, yaml.MappingNode) and len(node.value) == 1 and place_of(node).startswith(COMMAND_LINE):
        ((part, node),) = node.value
        key = f"{key}.{part.value}"
    what, place = f"unknown setting {head}{shown(key)}", place_of(node)
    near = _nearest(schema, key, head, root) if len(key) < 100 else ""
    fix = f"did you mean {near}?" if near else f"known settings: {', '.join(f.name for f in fields(schema))}"
    if near == key and "." in key and not place.startswith(COMMAND_LINE):
        section, _, rest = key.partition(".")
        fix = f"write it in its section, {section}: {{{rest}: VALUE}}"
    return ConfigError(what, place, fix)


def _nearest(schema: Any, key: str, head: str, root: type) -> str:
    """The setting that was probably meant: the same name in another section, or a similar spelling."""
    settings = [setting.key for setting in settings_of(schema, head)]
    sections = [f"{head}{f.name}" for f in fields(schema)]
    # `--lr=1e-4` and `--train.lr=1e-4` mean optimizer.lr: a name without its section is the most frequent mistake.
    every = [*settings, *(setting.key for setting in settings_of(root))]
    same = [k for k in every if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(f"{head}{key}", same, 1, 0)
    return (near or difflib.get_close_matches(f"{head}{key}", [*settings, *sections], 1, 0.4) or [""])[0]


def _set(config: Any, override: str) -> None:
    """Sets `--section.key=value`, or `--list.NAME.key=value` of the entry of that name or number."""
    if not override.startswith("--") or "=" not in override:
        raise ConfigError(f"cannot read the argument {shown(override)}", COMMAND_LINE, "write --section.key=value")
    head, _, rest = override[2:].partition(".")
    listed = getattr(config, head, None) if head in {f.name for f in fields(config)} else None
    if not isinstance(listed, list) or not any(map(is_dataclass, listed)):
        key, text = override[2:].split("=", 1)
        _fill(config, _nested(key, Override(text, override)))
        return
    names = [str(getattr(item, "name", i)) for i, item in enumerate(listed)]
    # A name may have dots and equals signs, as those of folders do: the longest that fits.
    fitting = [name for name in names if rest.startswith((f"{name}.", f"{name}=")) and "=" in rest[len(name) :]]
    if not fitting:  # NAME/PART, as an entry of a meta JSON is called: the setting is that of NAME
        keys = "|".join(f.name for f in fields(listed[0]))
        fitting = [name for name in names if re.match(rf"{re.escape(name)}/.*?\.({keys})[.=]", rest)]
        rest = re.sub(rf"/.*?(?=\.({keys})[.=])", "", rest, count=1) if fitting else rest
    name = max(fitting, key=len, default=re.split("[.=]", rest)[0])
    rest, text = rest[len(name) :].removeprefix(".").split("=", 1)
    value = Override(text, override)
    if name not in names and not (name.isdecimal() and int(name) < len(names)):
        near = difflib.get_close_matches(name, names, 1)
        fix = f"did you mean {head}.{near[0]}?" if near else f"known entries: {', '.join(names) or 'none'}"
        raise ConfigError(f"{head} has no entry {shown(name)}", place_of(value), fix)
    if not rest:
        what = f"{head}.{name} is a section, not a value"
        raise ConfigError(what, place_of(value), f"write {head}.{name}.NAME=VALUE")
    entry = listed[names.index(name) if name in names else int(name)]
    _fill(entry, _nested(rest, value), f"{head}.{name}.", type(config))


def _nested(key: str, value: yaml.Node) -> yaml.Node:
    """`value` under the dotted name `key`."""
    for part in reversed(key.split(".")):
        name = yaml.ScalarNode(value.tag, part, value.start_mark, value.end_mark)
        value = yaml.MappingNode(value.tag, [(name, value)], value.start_mark, value.end_mark)
    return value
