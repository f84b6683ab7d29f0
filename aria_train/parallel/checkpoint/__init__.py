"""Checkpoints that are complete or invisible.

A checkpoint is a folder `step_00000100` of distributed-checkpoint files and a `manifest.json` that lists them with
their checksums. Tensors are saved under global names with their sharding, so any layout of ranks can load them.

    manifest.py  what a checkpoint is            writing.py  from all ranks, published in one atomic step
    reading.py   verify, then load               saver.py    the same beside the training
    shelf.py     the checkpoints of a run        storage.py  a path or an fsspec URL
"""

from aria_train.parallel.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from aria_train.parallel.checkpoint.reading import load, read_index, reader, stored_shapes, verify
from aria_train.parallel.checkpoint.saver import Saver
from aria_train.parallel.checkpoint.shelf import (
    Entry,
    entries,
    folder_of_step,
    home_of,
    latest,
    newest_intact,
    prune,
    resolve,
)
from aria_train.parallel.checkpoint.storage import Folder, listing, locate, try_writing
from aria_train.parallel.checkpoint.writing import SaveFailed, save, save_alone

__all__ = [
    "MANIFEST",
    "Entry",
    "Folder",
    "Manifest",
    "SaveFailed",
    "Saver",
    "entries",
    "folder_of_step",
    "home_of",
    "latest",
    "listing",
    "load",
    "locate",
    "newest_intact",
    "prune",
    "read_index",
    "read_manifest",
    "reader",
    "resolve",
    "save",
    "save_alone",
    "stored_shapes",
    "try_writing",
    "verify",
]
