"""The manifest: what a checkpoint is, and a checksum of every file in it, itself included."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aria_train.errors import CheckpointError
from aria_train.parallel.checkpoint.storage import Folder

MANIFEST = "manifest.json"
FORMAT = 2
_LARGEST = 2**26
"""Bytes. A manifest grows by about a hundred bytes per rank."""


@dataclass
class Manifest:
    """What a checkpoint is. Its presence, with every file it lists, makes the checkpoint complete."""

    step: int
    tokens: int
    config: dict[str, Any]
    """The resolved configuration of the run that wrote it."""
    layout: dict[str, int]
    """World size and expert ranks at the time; for information, any layout can load."""
    sources: dict[str, int]
    """Windows per epoch of every training source, which fix the data order."""
    files: dict[str, dict[str, int]]
    """File name -> bytes and CRC-32."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard against bad batches knows; see `train/guard.py`."""
    format: int = FORMAT
    fingerprints: dict[str, str] = field(default_factory=dict)
    """What tells the corpus of every training source apart; empty in older checkpoints, which have no such entry."""

    @property
    def is_good(self) -> bool:
        """Whether no step right before it was skipped as bad: a state to go back to."""
        return not self.guard.get("streak")

    @property
    def updates(self) -> int:
        """Steps whose update is in the weights."""
        return self.step - int(self.guard.get("skipped", 0))

    @property
    def num_bytes(self) -> int:
        """Bytes in the checkpoint's files, without the manifest."""
        return sum(file["bytes"] for file in self.files.values())


def encode(manifest: Manifest) -> bytes:
    """The manifest's file: JSON whose last entry is the CRC-32 of the JSON without it."""
    fields = asdict(manifest)
    if not manifest.fingerprints:
        del fields["fingerprints"]
    body = json.dumps(fields, indent=1)
    return json.dumps(fields | {"crc32": zlib.crc32(body.encode())}, indent=1).encode()


def decode(content: bytes) -> Manifest:
    """The reverse of `encode`. Raises ValueError or TypeError for bytes that `encode` cannot have made."""
    fields = json.loads(content)
    del fields["crc32"]
    manifest = Manifest(**fields)
    if manifest.format != FORMAT:
        raise ValueError(f"format {manifest.format}; this version reads format {FORMAT}")
    # Byte for byte, so that not even a changed blank passes.
    if encode(manifest) != content:
        raise ValueError("it does not match its own checksum")
    for name, entry in manifest.files.items():
        if "/" in name or set(map(type, entry.values())) != {int} or entry.keys() != {"bytes", "crc32"}:
            raise ValueError(f"the entry of file {name!r:.80} makes no sense")
    return manifest


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a checkpoint; `check_sizes` compares its files' sizes, `verify` their bytes.

    Raises CheckpointError if it is torn or not a checkpoint.
    """
    try:
        with (folder / MANIFEST).open("rb") as stream:
            return decode(stream.read(_LARGEST))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}. Give a folder such as "
            "RUN_DIR/checkpoints/step_00000100, or a run directory that holds one."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {MANIFEST}: {error!s:.200}. Use another checkpoint."
        ) from None
    except Exception as error:  # What an object store may raise has no common type.
        raise CheckpointError(
            f"checkpoint {folder} cannot be read: {MANIFEST}: {error!s:.200}. Use another checkpoint."
        ) from None


def check_sizes(folder: Folder, manifest: Manifest, inside: Mapping[str, int | None]) -> None:
    """Raises CheckpointError unless the folder, whose listing is `inside`, holds every file at its size."""
    for name, entry in manifest.files.items():
        size, found = entry["bytes"], inside.get(name)
        if name not in inside or found not in (size, None):
            state = f"{found} bytes" if name in inside else "missing"
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is {state}, {size} bytes were written.")
