"""Checkpoints that are complete or invisible.

A checkpoint is a folder `step_00000100` of distributed-checkpoint files and a `manifest.json`. It is written as
`step_00000100.writing`; when every rank's bytes are on disk the manifest follows, and one rename publishes it. A
process that dies before the rename leaves only the `.writing` folder, which nothing reads.

Tensors are saved under global names with their sharding, so any layout of ranks can load them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from aria_train.errors import CheckpointError
from aria_train.model.aria import part_of

MANIFEST = "manifest.json"
_WRITING = ".writing"
_FORMAT = 1


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
    format: int = _FORMAT


def folder_of_step(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def save(target: Path, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Writes a checkpoint from all ranks together, and publishes it. Collective."""
    writing = target.with_name(target.name + _WRITING)
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(writing, sync_files=True))
    # Ranks read back what they wrote, still in the page cache: together they cover every file once.
    mine = {path.name: _fingerprint(path) for path in writing.iterdir() if _owner(path) == dist.get_rank()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() == 0:
        manifest.files = {name: print_ for part in gathered for name, print_ in sorted(part.items())}
        _publish(writing, target, manifest)
    dist.barrier()


def save_alone(target: Path, write: Callable[[Path], None], manifest: Manifest) -> None:
    """One process writes and publishes a checkpoint whose data files `write` puts into the folder it is given."""
    if target.exists():
        raise CheckpointError(f"{target} already exists. Give a new folder.")
    writing = target.with_name(target.name + _WRITING)
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        write(writing)
        manifest.files = {path.name: _fingerprint(path) for path in sorted(writing.iterdir())}
        _publish(writing, target, manifest)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _publish(writing: Path, target: Path, manifest: Manifest) -> None:
    """The manifest, then the rename that makes the checkpoint visible."""
    _write_durably(writing / MANIFEST, json.dumps(asdict(manifest), indent=1))
    _sync_folder(writing)
    if target.exists():
        shutil.rmtree(target)
    writing.rename(target)
    _sync_folder(target.parent)


def load(folder: Path, tensors: Mapping[str, Tensor], parts: Collection[str] | None = None) -> None:
    """Fills the tensors, at whatever layout they have now, from a checkpoint. Collective.

    Raises CheckpointError if the checkpoint lacks one of them or holds it in another shape. Model tensors that it has
    beyond them are an error too, unless they belong to a part of the model that is not among `parts`.
    """
    check_names(folder, tensors, parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder))


def check_names(folder: Path, tensors: Mapping[str, Tensor], parts: Collection[str] | None = None) -> None:
    """Every wanted tensor is in the checkpoint, in the same shape, and no model tensor of these parts is left over."""
    stored = stored_shapes(folder)
    missing = sorted(set(tensors) - set(stored))
    extra = sorted(name for name in set(stored) - set(tensors) if name.startswith("model."))
    if parts is not None:
        extra = [name for name in extra if part_of(name.removeprefix("model.")) in parts]
    differing = [
        f"{name} is {stored[name]} there and {tuple(tensors[name].shape)} here"
        for name in sorted(set(tensors) & set(stored))
        if stored[name] != tuple(tensors[name].shape)
    ]
    problems = [f"{len(missing)} tensor(s) missing there, such as {missing[0]}"] if missing else []
    problems += [f"{len(extra)} tensor(s) too many there, such as {extra[0]}"] if extra else []
    problems += [f"{len(differing)} of another shape: {differing[0]}"] if differing else []
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} is of another model: {'; '.join(problems)}. "
            "Use a checkpoint of this architecture, or another train.run_dir to start afresh."
        )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(m.size) for name, m in metadata.items() if isinstance(m, TensorStorageMetadata)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint. Raises CheckpointError if it is torn or not one."""
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}. Give a folder such as "
            "RUN_DIR/checkpoints/step_00000100, or a run directory that holds one."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}/{MANIFEST} is damaged ({error!r:.120}). Use another checkpoint.") from None
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes"
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is {state}, {size} bytes were written.")
    return manifest


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence about each torn one that was passed over."""
    torn: list[str] = []
    folders = sorted((run_dir / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        if folder.name.endswith(_WRITING):
            torn.append(f"ignored {folder}: its writing was interrupted")
            continue
        try:
            read_manifest(folder)
        except CheckpointError as error:
            torn.append(f"ignored {folder}: {error}")
            continue
        return folder, torn
    return None, torn


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, given itself or the run directory around it."""
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    if (path / "checkpoints").is_dir():
        newest, torn = latest(path)
        if newest is not None:
            return newest
        raise CheckpointError(f"run directory {path} has no complete checkpoint. {' '.join(torn)}".strip())
    read_manifest(path)
    return path


def prune(run_dir: Path, keep_last: int) -> None:
    """Removes all but the newest complete checkpoints, and what interrupted savings left. One rank calls it."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    complete = [folder for folder in folders if not folder.name.endswith(_WRITING)]
    for folder in [f for f in folders if f.name.endswith(_WRITING)] + complete[:-keep_last]:
        # The manifest goes first, so that a half-removed folder is not taken for a checkpoint.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _owner(path: Path) -> int:
    """Data files are named `__RANK_N.distcp`; rank 0 writes the rest."""
    parts = path.name.split("_")
    return int(parts[2]) if path.suffix == ".distcp" else 0


def _fingerprint(path: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
