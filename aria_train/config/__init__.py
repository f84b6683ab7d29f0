"""Typed configuration: one YAML file per stage, one class per section.

`load_config(path, overrides)` reads the file, fills in the model preset, applies `section.key=value` overrides,
and checks everything that can be checked before anything is allocated. Errors name the file and line, the key,
what was given, what is allowed, and the nearest valid key.
"""

from aria_train.config.fields import AdamKernel, Part
from aria_train.config.reading import dump_config, load_config
from aria_train.config.run import RunConfig, check_world
from aria_train.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LaunchConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    NeedleConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
    VisionConfig,
)

__all__ = [
    "AdamKernel",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LaunchConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "NeedleConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Part",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainConfig",
    "VisionConfig",
    "check_world",
    "dump_config",
    "load_config",
]
