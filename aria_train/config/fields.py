"""Types of the configuration's values, and what all its sections have in common."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_TOKEN_SUFFIX = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _parse_tokens(value: Any) -> Any:
    """`6.4T`, `33B`, `2e9` and `1_000` all name a number of tokens."""
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        scale = _TOKEN_SUFFIX.get(text[-1:].upper(), 1)
        try:
            value = float(text[:-1] if scale > 1 else text) * scale
        except ValueError:
            raise ValueError("a number of tokens, such as 500M, 33B, 6.4T or 1_000_000") from None
        return round(value) if abs(value) < 2**63 else value
    return value


def _refuse_bool(value: Any) -> Any:
    """Python counts true as 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _parse_float(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; people mean a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d_.]+(e[-+]?\d+)?", value.strip(), re.IGNORECASE):
        return float(value.replace("_", ""))
    return value


def _off_for_false(value: Any) -> Any:
    """YAML 1.1 reads `off` as false."""
    return "off" if value is False else value


def _refuse_url(value: str) -> str:
    """Without this, `s3://bucket/run` would be a folder `s3:` of the current one."""
    if "://" in value:
        raise ValueError(
            "must be a path of this machine, not a URL; checkpoints alone may lie elsewhere, where "
            "checkpoint.storage says"
        )
    return value


LocalPath = Annotated[str, AfterValidator(_refuse_url)]
NotBool = BeforeValidator(_refuse_bool)
Tokens = Annotated[int, NotBool, BeforeValidator(_parse_tokens), Field(ge=0)]
Number = Annotated[float, NotBool, BeforeValidator(_parse_float), Field(allow_inf_nan=False)]
AboveZero = Annotated[Number, Field(gt=0)]
WandbMode = Annotated[Literal["off", "offline", "online"], BeforeValidator(_off_for_false)]
Part = Literal["decoder", "vision", "projector"]
"""A part of the model that a stage may start from elsewhere, freeze, or give a learning rate of its own."""
AdamKernel = Literal["torch", "apex", "transformer_engine"]
"""Whose kernel computes AdamW's update."""
Positive = Annotated[int, NotBool, Field(gt=0)]
NonNegative = Annotated[int, NotBool, Field(ge=0)]
Size = Annotated[Positive, Field(lt=2**31)]
"""Of a tensor along one of its dimensions."""
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors; values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True, strict=False)
