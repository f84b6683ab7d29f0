"""From a YAML file, the preset it names and overrides, to a configuration; and back."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from aria_train.config.explaining import Lines, did_you_mean, explain
from aria_train.config.run import RunConfig
from aria_train.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a stage's YAML, applies `section.key=value` overrides, and validates the whole.

    Raises ConfigError naming file, line, key, value and what is allowed.
    """
    path = Path(path)
    raw, lines = read_yaml(path)
    for override in overrides:
        _apply_override(raw, lines, override)
    model = raw.get("model")
    if isinstance(model, dict) and model.get("preset") is not None:
        raw["model"] = _merge(_read_preset(str(model["preset"]), path), model)
    try:
        return RunConfig.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, path, lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same value."""
    data = config.model_dump(mode="json")
    data["model"]["preset"] = None
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A YAML mapping with safe loading, no duplicate keys, and the place of every key."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {error}.") from None
    except Exception as error:  # PyYAML raises anything at values that are not of the type their tag says.
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(raw, dict) or not isinstance(node, yaml.MappingNode):
        given = reprlib.repr(raw)
        raise ConfigError(f"{path}: a configuration is a mapping of sections (model:, train:, ...), not {given:.80}.")
    lines: Lines = {}
    _collect_lines(node, (), path, lines)
    return raw, lines


_MOST_LINES, _DEEPEST = 20_000, 30


def _collect_lines(node: yaml.Node, at: tuple[str, ...], path: Path, lines: Lines) -> None:
    # A few aliases of aliases are as good as endless.
    if len(lines) > _MOST_LINES or len(at) > _DEEPEST:
        raise ConfigError(f"{path}: has more than {_MOST_LINES:,} keys, or nests them deeper than {_DEEPEST}.")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            if here in lines:
                raise ConfigError(
                    f"{path}, line {key.start_mark.line + 1}: {'.'.join(here)} is given twice "
                    f"(first at {lines[here]}). Keep one."
                )
            lines[here] = f"{path}, line {key.start_mark.line + 1}"
            _collect_lines(value, here, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, str(index))] = f"{path}, line {value.start_mark.line + 1}"
            _collect_lines(value, (*at, str(index)), path, lines)


def _apply_override(raw: dict[str, Any], lines: Lines, override: str) -> None:
    key, separator, text = override.partition("=")
    at = tuple(key.strip().split("."))
    if not separator or not all(at):
        raise ConfigError(f"command line: {override!r} is not an override; write section.key=value.")
    try:
        value = yaml.safe_load(text)
    except Exception:  # as in read_yaml
        raise ConfigError(f"command line: {override}: the value is not valid YAML.") from None
    target: Any = raw
    for part in at[:-1]:
        if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
            target = target[int(part)]
            continue
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, (dict, list)):
            raise ConfigError(f"command line: {override}: {part} is not a section.")
    if isinstance(target, list):
        if not at[-1].isdecimal() or int(at[-1]) >= len(target):
            raise ConfigError(f"command line: {override}: {'.'.join(at[:-1])} has entries 0 to {len(target) - 1}.")
        target[int(at[-1])] = value
    else:
        target[at[-1]] = value
    lines[at] = "command line"


def _read_preset(name: str, config_path: Path) -> dict[str, Any]:
    """Finds `models/NAME.yaml` beside the configuration, in a folder above it, or among those shipped."""
    package = Path(__file__).resolve().parents[1]
    folders = [parent / "models" for parent in config_path.resolve().parents]
    folders += [package / "configs" / "models", package.parent / "configs" / "models"]
    candidates = [folder / f"{name}.yaml" for folder in folders]
    if name.endswith((".yaml", ".yml")):
        candidates = [Path(name), config_path.parent / name]
    for candidate in candidates:
        if candidate.is_file():
            return read_yaml(candidate)[0]
    known = sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})
    raise ConfigError(
        f"{config_path}: model.preset: no preset {name!r}{did_you_mean(name, known)}. Presets are "
        f"files in configs/models/: {', '.join(known) or 'none found'}."
    )


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins key by key; sections merge, except that null removes one."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
