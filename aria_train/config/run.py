"""A whole stage, with the checks that concern several sections, or the number of ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from aria_train.config.fields import Section
from aria_train.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LaunchConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from aria_train.errors import ConfigError


class RunConfig(Section):
    """One stage, resolved. See `load_config`."""

    stage: str
    """Name of the stage; reported with every metric."""
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    launch: LaunchConfig = LaunchConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def tokens_per_step(self) -> int:
        """Window positions per optimizer step."""
        return self.train.global_batch_size * self.train.context_length

    @property
    def total_steps(self) -> int:
        """Steps after which the run is complete."""
        limits = []
        if self.train.max_steps is not None:
            limits.append(self.train.max_steps)
        if self.train.max_tokens is not None:
            limits.append(-(-self.train.max_tokens // self.tokens_per_step))
        return min(limits)

    def rope_base_at(self, tokens: int) -> float:
        """RoPE base of the step that begins after `tokens` tokens of this run."""
        base, start = self.model.rope_base, self.schedule.rope_from
        if start is None or tokens >= self.schedule.rope_tokens:
            return base
        return start * (base / start) ** (tokens / self.schedule.rope_tokens)

    def doubts(self) -> Iterator[str]:
        """What works, and is seldom meant."""
        tokens = self.total_steps * self.tokens_per_step
        if self.schedule.warmup_tokens > tokens:
            yield (
                f"schedule.warmup_tokens {self.schedule.warmup_tokens:,} is more than the {tokens:,} tokens of the "
                "run: the learning rate never reaches optimizer.lr"
            )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        train, model = self.train, self.model
        if train.max_tokens is None and train.max_steps is None:
            raise ValueError("train.max_tokens or train.max_steps must say how long to train")
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {train.global_batch_size} is not divisible by "
                f"train.micro_batch_size {train.micro_batch_size}"
            )
        if train.context_length > model.max_positions:
            raise ValueError(
                f"train.context_length {train.context_length} exceeds model.max_positions {model.max_positions}"
            )
        # Rows of the grouped matrix products are read 16 bytes at a time.
        multiple = 8 if train.precision == "bf16" else 4
        with_precision = f"train.precision {train.precision}"
        if train.fp8_experts:
            if train.precision != "bf16":
                raise ValueError(f"train.fp8_experts needs train.precision bf16 for all else, not {train.precision}")
            multiple, with_precision = 16, "train.fp8_experts"
        for key in ("hidden_size", "expert_size"):
            if getattr(model, key) % multiple:
                raise ValueError(
                    f"model.{key} {getattr(model, key)} must be a multiple of {multiple} with {with_precision}, "
                    f"such as {_nearest_multiple(getattr(model, key), multiple)}"
                )
        experts, ranks = model.num_experts, self.parallel.expert_parallel_size
        if experts % ranks:
            raise ValueError(
                f"model.num_experts {experts} is not divisible by parallel.expert_parallel_size {ranks}; "
                f"allowed: {_divisors(experts)}"
            )
        if model.vision is None:
            named = {*train.freeze, *self.optimizer.lr_scale, *self.checkpoint.init_fresh} - {"decoder"}
            if named or self.checkpoint.init_vision_from:
                raise ValueError(f"model.vision is null, but the configuration speaks of its parts: {sorted(named)}")
        if set(train.freeze) >= ({"decoder", "vision", "projector"} if model.vision else {"decoder"}):
            raise ValueError("train.freeze names every part of the model: nothing is left to train")
        if train.lora is not None and train.freeze:
            raise ValueError("train.lora freezes all weights; take train.freeze out")
        if train.lora is not None and (self.checkpoint.init_fresh or self.checkpoint.init_vision_from):
            raise ValueError(
                "train.lora trains adapters on checkpoint.init_from as it is; checkpoint.init_fresh and "
                "checkpoint.init_vision_from would change it"
            )
        if train.lora is not None and "experts" in train.lora.targets and train.lora.rank % multiple:
            raise ValueError(
                f"train.lora.rank {train.lora.rank} must be a multiple of {multiple} with adapters on experts and "
                f"train.precision {train.precision}"
            )
        if self.evaluation.visual_needle is not None and self.evaluation.visual_needle.questions is None:
            raise ValueError("evaluation.visual_needle needs questions: a prepared corpus of questions about images")
        if self.schedule.kind == "wsd" and not self.schedule.decay_tokens:
            raise ValueError("schedule.kind wsd needs schedule.decay_tokens above 0")
        _refuse_secrets(self.model_dump(mode="json"))
        return self


_CREDENTIALS = re.compile(r"://[^/\s@]*:[^/\s]*@|https?://[^/\s]*@")
"""`user:password@`. A name alone is Azure's way to name a container, but with https it is often a token."""
_ASSIGNED_SECRET = re.compile(r"(key|_token|secret|password)=[\"']?[^\s$\"']", re.IGNORECASE)


def _refuse_secrets(value: Any, at: str = "") -> None:
    """The configuration is written into run directories, checkpoints and job scripts, where no secret belongs. The
    message does not repeat it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_secrets(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _refuse_secrets(inner, f"{at}.{number}")
    elif isinstance(value, str) and _CREDENTIALS.search(value):
        raise ValueError(
            f"{at}: the URL holds a user name or a password, which would end up in checkpoints and logs. Give them "
            "the way the storage's own tools take them: environment variables or their configuration files"
        )
    elif isinstance(value, str) and at.startswith("launch.setup") and _ASSIGNED_SECRET.search(value):
        raise ValueError(
            f"{at}: sets a key, token or password, which would end up in checkpoints and logs. Put the line into a "
            "file that only you can read, and let launch.setup source it"
        )


def check_world(config: RunConfig, world_size: int) -> None:
    """Refuses a number of ranks that the configuration cannot be laid out on, saying which numbers can."""
    expert = config.parallel.expert_parallel_size
    group = config.parallel.zero_group_size or world_size
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if world_size % expert:
        raise ConfigError(
            f"parallel.expert_parallel_size {expert} does not fit {world_size} rank(s): the number of ranks must be a "
            f"multiple of it. Start {_nearest_multiple(world_size, expert)} ranks, or set "
            f"parallel.expert_parallel_size to one of {_common_divisors(world_size, config.model.num_experts)}."
        )
    if world_size % group or group % expert:
        raise ConfigError(
            f"parallel.zero_group_size {group} does not fit {world_size} rank(s) with parallel.expert_parallel_size "
            f"{expert}: it must divide the number of ranks and be a multiple of the expert ranks."
        )
    if batch % (world_size * micro):
        raise ConfigError(
            f"train.global_batch_size {batch} is not divisible by {world_size} rank(s) x train.micro_batch_size "
            f"{micro} = {world_size * micro}: every rank must run the same number of whole micro-batches. Set "
            f"train.global_batch_size to a multiple of {world_size * micro}, such as "
            f"{_nearest_multiple(batch, world_size * micro)}, or change the number of ranks."
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _common_divisors(a: int, b: int) -> list[int]:
    return [d for d in _divisors(a) if b % d == 0]


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
