"""A stage of a curriculum: its configuration, where it runs, and what it may change of the stage before it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aria_train.config import ModelConfig, RunConfig, load_config
from aria_train.errors import CheckpointError, ConfigError
from aria_train.parallel import checkpoint

MAY_CHANGE = frozenset(
    {
        "preset",
        "rope_base",
        "max_positions",
        "init_std",
        "balance_group_size",
        "balance_coefficient",
        "expert_balance_coefficient",
        "z_coefficient",
    }
)
"""Keys of `model` that no weight depends on the shape or meaning of. `vision` may be added, never changed or lost."""


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum, its run directory and its start settled."""

    name: str
    """Its YAML's file name without the suffix."""
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        return Path(self.config.train.run_dir)

    @property
    def final_checkpoint(self) -> str:
        """Where its last step is, or will be, saved."""
        return str(checkpoint.folder_of_step(checkpoint.home_of(self.config), self.config.total_steps))

    def newest_checkpoint(self) -> checkpoint.Entry[checkpoint.Folder] | None:
        """Its newest complete checkpoint so far."""
        newest, _ = checkpoint.latest(checkpoint.home_of(self.config))
        return newest

    def steps_done(self) -> int:
        """Steps of its newest complete checkpoint; 0 if there is none."""
        newest = self.newest_checkpoint()
        return newest.step if newest is not None else 0

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint of its last step is complete."""
        return self.steps_done() >= self.config.total_steps


def load_run(command: str, arguments: Sequence[str]) -> list[Stage]:
    """The stage that `aria-train train`, or the stages that `aria-train curriculum`, would run with these arguments.

    Raises ConfigError if they name none.
    """
    paths, overrides = split_arguments(arguments)
    if not paths:
        raise ConfigError("command line: no stage given; name the YAML file of a stage, or of several in order.")
    if command == "curriculum":
        return load_stages(paths, overrides)
    return [Stage(Path(path).stem, load_config(path, overrides)) for path in paths]


def load_stages(paths: Sequence[str], overrides: Sequence[str]) -> list[Stage]:
    """Reads the stages' files, in order; every stage but the first starts from the final checkpoint of the one before.

    Each stage trains in its own `train.run_dir`; given as an override, `train.run_dir=ROOT`, it puts all of them into
    ROOT, one folder per stage, and `checkpoint.storage=ROOT` likewise. Raises one ConfigError about everything in the
    files that cannot be read.
    """
    given = {override.partition("=")[0] for override in overrides}
    stages: list[Stage] = []
    problems: list[str] = []
    for path in paths:
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            problems.append(str(error))
            continue
        name = Path(path).stem
        if "train.run_dir" in given:
            config.train.run_dir = str(Path(config.train.run_dir) / name)
        storage = config.checkpoint.storage
        if "checkpoint.storage" in given and storage is not None:
            config.checkpoint.storage = f"{storage.rstrip('/')}/{name}"
        if stages:
            config.checkpoint.init_from = stages[-1].final_checkpoint
        stages.append(Stage(name, config))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    problems = list(_misplaced(stages))
    if problems:
        raise ConfigError("\n".join(problems))
    return stages


def run_root(stages: Sequence[Stage]) -> Path:
    """The folder that the stages' run directories lie in."""
    return stages[0].run_dir.parent


def _misplaced(stages: Sequence[Stage]) -> Iterator[str]:
    """Run directories that are not side by side in one folder, each with a stage of its own."""
    folders = [stage.run_dir.resolve() for stage in stages]
    homes = [stage.final_checkpoint.rpartition("/checkpoints/")[0] for stage in stages]
    twice = [str(folder) for folder in folders if folders.count(folder) > 1]
    twice = twice or [home for home in homes if homes.count(home) > 1]
    if twice:
        yield (
            f"several stages would train in, or save into, {twice[0]}. Name their files differently, or give each a "
            "train.run_dir (and checkpoint.storage) of its own."
        )
    elif len({folder.parent for folder in folders}) > 1:
        places = ", ".join(str(stage.run_dir) for stage in stages)
        yield (
            f"the stages' run directories do not lie in one folder: {places}. Give train.run_dir=ROOT: each stage then "
            "trains in a folder of ROOT named as its YAML."
        )


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Stage files and `section.key=value` overrides, in whatever order they were given."""
    is_override = re.compile(r"[A-Za-z_]\w*(\.\w+)*=").match
    overrides = [argument for argument in arguments if is_override(argument)]
    return [argument for argument in arguments if not is_override(argument)], overrides


def model_differences(before: ModelConfig, now: ModelConfig) -> Iterator[str]:
    """`key: value before, value now` for all that a stage must not change about the model it takes over."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for key in new:
        if key in MAY_CHANGE or old[key] == new[key] or (key == "vision" and old[key] is None):
            continue
        if key == "vision" and new[key] is not None:
            yield from (
                f"model.vision.{inner}: {old[key][inner]} before, {new[key][inner]} now"
                for inner in new[key]
                if old[key][inner] != new[key][inner]
            )
        else:
            yield f"model.{key}: {old[key] if key != 'vision' else 'given'} before, {new[key]} now"


def stored_config(path: str) -> RunConfig:
    """The configuration that a checkpoint was written under. Raises CheckpointError if there is no checkpoint."""
    manifest = checkpoint.read_manifest(checkpoint.resolve(path))
    try:
        return RunConfig.model_validate(manifest.config)
    except ValueError as error:
        raise CheckpointError(f"{path}: its configuration is not one of this program's: {error}") from None
