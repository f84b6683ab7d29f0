"""What is wrong with a configuration, in the user's terms: where, which key, what was given, what is allowed."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel

from aria_train.config.fields import Section
from aria_train.config.run import RunConfig

Lines = dict[tuple[str, ...], str]
"""Key path -> where it was given: `configs/x.yaml, line 12`, or `command line`."""

_NOT_BUILT = {
    "tensor_parallel": "tensor parallelism is not built: Aria trains with expert parallelism and ZeRO-1 alone "
    "(fine-grained experts are too narrow to split further). Use parallel.expert_parallel_size",
    "pipeline_parallel": "pipeline parallelism is not built: Aria trains with expert parallelism and ZeRO-1 alone, "
    "which needs no stages or bubbles. Use parallel.expert_parallel_size and parallel.zero_group_size",
}


def explain(error: pydantic.ValidationError, path: Path, lines: Lines) -> str:
    """One line for each mistake that validation found."""
    return "\n".join(_explain_one(dict(issue), path, lines) for issue in error.errors())


def _explain_one(issue: dict[str, Any], path: Path, lines: Lines) -> str:
    at = tuple(str(part) for part in issue["loc"])
    place = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), str(path))
    key = ".".join(at)
    if issue["type"] == "extra_forbidden":
        for word, reason in _NOT_BUILT.items():
            if at[-1].startswith(word):
                return f"{place}: {key}: {reason}."
        known = sorted(_keys_of(at[:-1]))
        allowed = ", ".join(known)
        return f"{place}: {key}: unknown key{did_you_mean(at[-1], known)}. Allowed here: {allowed}."
    if issue["type"] == "missing":
        return f"{place}: {key}: is required and not given."
    reason = str(issue["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if issue["type"] == "value_error" and isinstance(issue["input"], (dict, BaseModel)):
        return f"{place}: {key}: {reason}." if key else f"{place}: {reason}."
    given = re.sub(r"://[^/\s]*@", "://...@", reprlib.repr(issue["input"]))  # No secret is repeated.
    return f"{place}: {key}: {given:.80} given; {reason}."


def _keys_of(at: tuple[str, ...]) -> set[str]:
    """Field names of the section at a key path."""
    section: Any = RunConfig
    for part in at:
        if part.isdecimal():
            continue
        field = section.model_fields.get(part)
        section = _section_in(field.annotation) if field else None
        if section is None:
            return set()
    return set(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_section_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section), None)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The nearest of the known names, in brackets; nothing if none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
