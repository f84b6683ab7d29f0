"""`aria-train plan CONFIG`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aria_train.errors import ConfigError

if TYPE_CHECKING:
    from aria_train.config import RunConfig


def register(subparsers: Any) -> None:
    """Adds the command to the command line; imports nothing heavy."""
    plan = subparsers.add_parser(
        "plan",
        help="memory, communication and time on a number of GPUs, before spending them",
        description="Works out what a stage needs per GPU and how long it takes, and suggests layouts that fit.",
    )
    plan.add_argument("config", metavar="CONFIG", help="the stage's YAML file")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file's")
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks (default: the smallest number the layout admits)")
    plan.add_argument("--gpu", default="h100", metavar="KIND", help="a100-40, a100, h100, h200, b200, b300 (h100)")
    plan.add_argument("--memory", type=float, metavar="GIB", help="GiB of one GPU, where it is none of these")
    plan.add_argument("--peak", type=float, metavar="TFLOPS", help="its dense bf16 peak")
    plan.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached (0.4)")
    plan.add_argument("--images", type=int, default=0, metavar="N", help="images of the largest class per micro-batch")
    plan.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    plan.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> None:
    """Prints the plan."""
    from aria_train.config import load_config
    from aria_train.plan.memory import GPUS
    from aria_train.plan.report import as_json, as_text, make_plan
    from aria_train.plan.speed import PEAK_TFLOPS

    config = load_config(args.config, args.overrides)
    gpu = args.gpu.lower()
    for option in ("gpus", "memory", "peak"):
        value = getattr(args, option)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{option} {value}: must be above 0.")
    if gpu not in GPUS and (args.memory is None or args.peak is None):
        known = ", ".join(GPUS)
        raise ConfigError(f"--gpu {args.gpu}: known are {known}. For another give --memory GIB and --peak TFLOPS.")
    if not 0 < args.utilisation <= 1:
        raise ConfigError(f"--utilisation {args.utilisation}: a share above 0 and up to 1, such as 0.4.")
    gpus = args.gpus or config.parallel.zero_group_size or config.parallel.expert_parallel_size
    _check_images(args.images, config)
    memory, peak = args.memory or GPUS[gpu], args.peak or PEAK_TFLOPS[gpu]
    plan = make_plan(config, gpus, gpu, memory, peak, args.utilisation, args.images)
    print(as_json(plan) if args.json else as_text(plan))


def _check_images(images: int, config: RunConfig) -> None:
    if not images:
        return
    if config.model.vision is None:
        raise ConfigError("--images: this stage's model has no vision encoder (model.vision is null).")
    size, tokens = max(config.model.vision.image_sizes.items())
    positions = config.train.micro_batch_size * config.train.context_length
    if not 0 <= images * tokens <= positions:
        raise ConfigError(
            f"--images {images}: 0 to {positions // tokens}, as an image of class {size} becomes {tokens} tokens and "
            f"a micro-batch has {positions:,}."
        )
