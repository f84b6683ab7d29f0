"""All that a run resumes from, and what makes a resume legitimate."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from aria_train.config import RunConfig
from aria_train.errors import CheckpointError
from aria_train.model import AriaModel
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Entry, Folder, Manifest
from aria_train.train.adapters import BASE
from aria_train.train.guard import GuardState
from aria_train.train.optimizer import schedule_tokens


@dataclass
class TrainState:
    """Everything resumable. The data position, the schedule and the random state are functions of `step`."""

    model: AriaModel
    optimizer: torch.optim.Optimizer
    expert_counts: Tensor
    """float64 [L, E]: assignments over the last global batch, which the next step's balance loss uses."""
    step: int = 0
    """Optimizer steps behind us."""
    sources: dict[str, int] = field(default_factory=dict)
    """Windows per epoch of every training source."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """What tells the corpus of every training source apart."""
    guard: GuardState = field(default_factory=GuardState)
    """Skipped steps, and what judges the next."""
    base: Tensor | None = None
    """What tells which checkpoint is beneath the adapters, where adapters are trained; then they alone are saved."""
    taken_over: set[str] = field(default_factory=set)
    """Parameters whose moments came from an earlier run: Adam has counted more steps for them than this run has."""

    @property
    def updates(self) -> int:
        """Steps whose update is in the weights: what Adam counts."""
        return self.step - self.guard.skipped

    def tensors(self) -> dict[str, Tensor]:
        """Every saved tensor by its global name; shards as DTensors."""
        tensors: dict[str, Tensor] = {"train.expert_counts": self.expert_counts}
        if self.base is not None:
            tensors[BASE] = self.base
        moved = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.model.named_parameters():
            if self.base is None or parameter.requires_grad:
                tensors[f"model.{name}"] = parameter.detach()
            if parameter.requires_grad:
                assert parameter in moved, f"{name} is still gathered: after a forward pass alone, release parameters"
                state = self.optimizer.state[parameter]
                tensors[f"optimizer.{name}.exp_avg"] = state["exp_avg"]
                tensors[f"optimizer.{name}.exp_avg_sq"] = state["exp_avg_sq"]
                if name in self.taken_over:
                    tensors[f"optimizer.{name}.step"] = state["step"]
        return tensors

    def manifest(self, config: RunConfig) -> Manifest:
        """What a checkpoint of this state says about itself."""
        world = torch.distributed.get_world_size()
        return Manifest(
            step=self.step,
            tokens=self.step * config.tokens_per_step,
            config=config.model_dump(mode="json"),
            layout={"world_size": world, "expert_parallel_size": config.parallel.expert_parallel_size},
            sources=self.sources,
            files={},
            guard=asdict(self.guard),
            fingerprints=self.fingerprints,
        )

    def load(self, entry: Entry[Folder]) -> None:
        """Takes over everything from a checkpoint of the same run that was just verified, at any layout. Collective."""
        folder, manifest = entry.folder, entry.manifest
        assert manifest is not None, "complete"
        self.step = manifest.step
        # In place: the guard holds on to its state.
        vars(self.guard).update(vars(GuardState(**manifest.guard)))
        index = checkpoint.read_index(folder)
        stored = checkpoint.stored_shapes(folder, index)
        self.taken_over = {name for name, _ in self._trained() if f"optimizer.{name}.step" in stored}
        checkpoint.load(folder, self.tensors(), verified=True, index=index)
        for name, parameter in self._trained():
            if name not in self.taken_over:
                self.optimizer.state[parameter]["step"].fill_(float(self.updates))

    def take_over_moments(self, folder: Folder) -> str:
        """Adam's moments of an earlier run, for every trained parameter that it has them of. Collective.

        Returns a sentence about them; raises CheckpointError if there are none.
        """
        index = checkpoint.read_index(folder)
        stored = checkpoint.stored_shapes(folder, index)
        self.taken_over = {name for name, _ in self._trained() if f"optimizer.{name}.exp_avg" in stored}
        if not self.taken_over:
            raise CheckpointError(
                f"{folder} holds no optimizer moments of what this run trains. Set checkpoint.init_optimizer=false."
            )
        tensors = {
            name: tensor
            for name, tensor in self.tensors().items()
            if name.startswith("optimizer.") and name.removeprefix("optimizer.").rpartition(".")[0] in self.taken_over
        }
        found = {name: tensor for name, tensor in tensors.items() if name in stored}
        checkpoint.load(folder, found, parts=(), index=index)
        steps = float(checkpoint.read_manifest(folder).updates)
        for name in tensors.keys() - stored.keys():
            tensors[name].fill_(steps)
        return f"Adam's moments of {len(self.taken_over)} tensors from {folder}"

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


# What may differ between the run that saved and the run that goes on: layout, speed, logging, length, and (which is
# said) the learning rate. All else fixes the weights, the data order or the loss.
_FREE = {
    "parallel": None,
    "logging": None,
    "checkpoint": None,
    "evaluation": None,
    "guard": None,
    "launch": None,
    "data": {"tokenizer", "validation", "workers", "prefetch_batches"},
    "train": {
        "micro_batch_size", "max_tokens", "max_steps", "precision", "recompute", "run_dir", "eval_interval_steps",
        "eval_windows", "device", "profile", "compile", "fp8_experts",
    },
    "optimizer": {"kernel", "lr"},
    "schedule": {"kind", "warmup_tokens", "total_tokens", "decay_tokens", "min_lr_ratio"},
}  # fmt: skip


def check_resumable(
    config: RunConfig, sources: dict[str, int], fingerprints: dict[str, str], entry: Entry[Folder]
) -> None:
    """Refuses to go on from a checkpoint under a configuration, or with data, that would make another run of it."""
    folder, manifest = entry.folder, entry.manifest
    assert manifest is not None, "complete"
    before, now = _binding(manifest.config), _binding(config.model_dump(mode="json"))
    differing = [
        f"{key}: {before.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if not differing:
        differing = [
            f"data.train.{name}: {manifest.sources.get(name)} windows per epoch in the checkpoint, {windows} now"
            for name, windows in sources.items()
            if manifest.sources.get(name) != windows
        ]
    if not differing:
        differing = [
            f"data.train.{name}: another corpus than the checkpoint's, or its parts in another order"
            for name, fingerprint in fingerprints.items()
            if manifest.fingerprints.get(name, fingerprint) != fingerprint
        ]
    if differing:
        raise CheckpointError(
            f"{folder} cannot be resumed under this configuration; it differs in: {'; '.join(differing)}. "
            "Restore these values, or start a new run from its weights: another train.run_dir, with "
            f"checkpoint.init_from={folder}."
        )


def rate_changes(config: RunConfig, entry: Entry[Folder]) -> str | None:
    """A sentence about how the learning rate will differ from that of the run that saved a checkpoint, which can be
    resumed; None if it will not."""
    assert entry.manifest is not None, "complete"
    stored, values = entry.manifest.config, config.model_dump(mode="json")
    values["optimizer"]["lr"], values["schedule"] = stored["optimizer"]["lr"], stored["schedule"]
    values["train"] |= {key: stored["train"][key] for key in ("max_steps", "max_tokens")}
    before, now = _rate(RunConfig.model_validate(values)), _rate(config)
    changes = [
        f"{key} {before.get(key, 'none')} -> {now.get(key, 'none')}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    return f"the learning rate changes from step {entry.step + 1} on: {', '.join(changes)}" if changes else None


def _rate(config: RunConfig) -> dict[str, Any]:
    """What the learning rate follows from, as far as it counts."""
    schedule = config.schedule
    shape: dict[str, Any] = {"optimizer.lr": config.optimizer.lr, "schedule.kind": schedule.kind}
    shape["schedule.warmup_tokens"] = schedule.warmup_tokens
    if schedule.kind != "constant":
        shape["schedule.min_lr_ratio"] = schedule.min_lr_ratio
        shape["schedule.total_tokens"] = schedule_tokens(config)
    if schedule.kind == "wsd":
        shape["schedule.decay_tokens"] = schedule.decay_tokens
    return shape


def _binding(config: dict[str, Any]) -> dict[str, Any]:
    """The keys a resume must not change, flat: `section.key` -> value. Corpora may move, so paths are left out."""
    flat: dict[str, Any] = {}
    for section, values in config.items():
        free = _FREE.get(section, set())
        if free is None:
            continue
        if not isinstance(values, dict):
            flat[section] = values
            continue
        for key, value in values.items():
            if key == "preset" or key in free:
                continue
            if section == "data" and key == "train":
                # In order: it decides which window of the run is whose.
                value = [{k: v for k, v in source.items() if k != "path" and v is not None} for source in value]
            flat[f"{section}.{key}"] = value
    return flat
