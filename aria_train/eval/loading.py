"""A checkpoint as a model that answers: whole on one process, or spread over the ranks torchrun started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from aria_train.config import ParallelConfig, RunConfig
from aria_train.errors import ConfigError
from aria_train.model import AriaModel
from aria_train.parallel import checkpoint
from aria_train.parallel.mesh import Meshes, build_meshes, init_process_group, pick_device
from aria_train.parallel.shard import parallelize
from aria_train.train.adapters import load_whole


@dataclass
class Loaded:
    """A model ready for evaluation, and where it came from."""

    model: AriaModel
    config: RunConfig
    """Of the run that wrote the checkpoint, but `parallel` is the layout now."""
    meshes: Meshes
    folder: checkpoint.Folder
    """The checkpoint's."""
    step: int
    """Optimizer steps behind it."""

    @property
    def title(self) -> str:
        """For pictures."""
        return f"{self.config.stage}, step {self.step:,}"

    @property
    def report_folder(self) -> Path:
        """`report/` of the run directory, or beside a checkpoint that is not in one."""
        if not isinstance(self.folder, Path) or self.config.checkpoint.storage is not None:
            return Path(self.config.train.run_dir) / "report"
        home = self.folder.absolute().parent
        return (home.parent if home.name == "checkpoints" else home) / "report"

    @property
    def is_main(self) -> bool:
        return self.meshes.rank == 0


def load_for_eval(path: str | Path) -> Loaded:
    """The model of a checkpoint (or of a run directory's newest), whatever layout wrote it, on the ranks there are now.

    Computes in bf16 on GPUs and in fp32 on CPUs. Joins or makes the process group. Collective.
    """
    folder = checkpoint.resolve(path)
    manifest = checkpoint.read_manifest(folder)
    config = RunConfig.model_validate(manifest.config)
    device = pick_device("auto")
    init_process_group(device)
    world = dist.get_world_size()
    # Experts stay together as in training, as far as the ranks allow.
    config.parallel = ParallelConfig(expert_parallel_size=math.gcd(config.parallel.expert_parallel_size, world))
    meshes = build_meshes(config.parallel, device)
    if world == 1:
        model = load_model(folder, config, device)
    else:
        with torch.device("meta"):
            model = AriaModel(config.model)
        parallelize(model, meshes, "bf16" if device.type == "cuda" else "fp32")
        model.to_empty(device=device)
        _fill(model, folder)
    model.rope_base = config.rope_base_at(manifest.tokens)
    return Loaded(model.eval(), config, meshes, folder, manifest.step)


def load_model(folder: checkpoint.Folder, config: RunConfig, device: torch.device) -> AriaModel:
    """The whole model of a checkpoint on one device."""
    with torch.device("meta"):
        model = AriaModel(config.model)
    # The type first: at no time do weights of another exist.
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    _fill(model, folder)
    return model


def _fill(model: AriaModel, folder: checkpoint.Folder) -> None:
    load_whole(folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()})


def tokenizer_folder(given: str | None, config: RunConfig) -> str:
    """The tokenizer's folder: the one given, else the one the checkpoint's run named."""
    folder = given or config.data.tokenizer
    if folder is None:
        raise ConfigError("the checkpoint's run names no tokenizer (data.tokenizer); give one with --tokenizer FOLDER.")
    return folder
