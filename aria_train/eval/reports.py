"""`aria-train eval ...`: load a checkpoint on however many ranks there are, evaluate it, show and keep the result.

Rank 0 prints, ending with the result as one line of JSON, and writes it with its picture into the run directory's
`report/`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic

from aria_train.config import NeedleConfig, RunConfig, SourceConfig
from aria_train.errors import ConfigError
from aria_train.eval import probes
from aria_train.eval.answers import answer_questions, read_questions
from aria_train.eval.experts import count_expert_use
from aria_train.eval.loading import Loaded, load_for_eval, tokenizer_folder
from aria_train.eval.loss import evaluate_loss, most_batches
from aria_train.eval.needle import run_needles
from aria_train.eval.progress import progress_bar
from aria_train.eval.prompts import PromptWriter
from aria_train.parallel.job import orderly_end


def run_loss(args: argparse.Namespace) -> None:
    """`aria-train eval loss`: mean cross-entropy of held-out tokens, by source."""
    with _evaluating(args) as (loaded, report):
        with progress_bar("held-out loss", most_batches(loaded.config, loaded.meshes), loaded.is_main) as advance:
            losses = evaluate_loss(loaded.model, loaded.config, loaded.meshes, advance)
        lines = [f"{name:<32} {loss:.4f} nats per token" for name, loss in losses.items()]
        report("loss", losses, None, lines)


def run_needle(args: argparse.Namespace) -> None:
    """`aria-train eval needle`: a grid of haystacks, with text or images for needles."""
    with _evaluating(args) as (loaded, report):
        config = loaded.config
        config.data.tokenizer = tokenizer_folder(args.tokenizer, config)
        needle = _validated(
            NeedleConfig, haystack=args.haystack, questions=args.questions, lengths=args.lengths, depths=args.depths,
            trials=args.trials,
        )  # fmt: skip
        grid = probes.grid_of(needle, config)
        needles = (probes.open_visual_needles if args.questions else probes.open_text_needles)(needle, config)
        stop = {config.model.eos_token_id}
        with progress_bar(f"{needles.name} needles", len(grid.cells()), loaded.is_main) as advance:
            tokens = probes.batch_tokens(config)
            result = run_needles(loaded.model, loaded.meshes, needles, grid, tokens, stop, advance)
        lines = [f"{'tokens':>8}  found at depths 0 to 1, teacher-forced"]
        for length, row in zip(grid.lengths, result.teacher_forced, strict=True):
            lines.append(f"{length:>8}  " + " ".join(f"{share:4.2g}" for share in row))
        lines.append(f"found {result.accuracy:.1%} of all, in {result.cells_found:.1%} of the cells most")
        draw = probes.needle_drawing(result, loaded.title)
        report(f"needle_{needles.name}", result.as_json(), draw, lines)


def run_experts(args: argparse.Namespace) -> None:
    """`aria-train eval experts`: which experts see and which read, by source."""
    with _evaluating(args) as (loaded, report):
        probes.check_experts(loaded.config)
        with progress_bar("routing", most_batches(loaded.config, loaded.meshes), loaded.is_main) as advance:
            use = count_expert_use(loaded.model, loaded.config, loaded.meshes, advance)
        result = use.as_json()
        lines = []
        for name, domain in result["domains"].items():
            visual, count = sum(domain["visual_experts"]), loaded.config.model.num_experts
            total = count * loaded.config.model.num_layers
            lines.append(
                f"{name:<24} {visual} of {total} experts are visual (chosen {probes.VISUAL_ABOVE:g}x as often)"
            )
        report("experts", result, probes.expert_drawing(use, loaded.title), lines)


def run_answers(args: argparse.Namespace) -> None:
    """`aria-train eval answers`: exact-match accuracy on questions with known answers, and a contact sheet."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: must be 1 or more.")
    with _evaluating(args) as (loaded, report):
        writer = PromptWriter(tokenizer_folder(args.tokenizer, loaded.config), loaded.config.model)
        prompts = read_questions(args.questions, writer, args.limit)
        with progress_bar("questions", len(prompts), loaded.is_main) as advance:
            tokens = probes.batch_tokens(loaded.config)
            result = answer_questions(loaded.model, loaded.meshes, prompts, writer, tokens, advance)
        name = Path(args.questions).name.removesuffix(".jsonl")
        title = f"{name}: {result.accuracy:.1%} right, {loaded.title}"
        lines = [f"{result.accuracy:.1%} of {len(prompts):,} answers are right, word for word"]
        report(
            f"answers_{name}",
            {"source": args.questions, **result.as_json()},
            probes.answer_drawing(prompts, result, title),
            lines,
        )


# ---------------------------------------------------------------------------------------------------------------------
# What all have in common

Report = Callable[[str, dict[str, Any], Callable[[Path], None] | None, list[str]], None]
"""(name, result, what draws it, lines for people)"""


@contextmanager
def _evaluating(args: argparse.Namespace) -> Iterator[tuple[Loaded, Report]]:
    """The checkpoint, with the data that the arguments ask for, and where results go."""
    with orderly_end():
        loaded = load_for_eval(args.checkpoint)
        loaded.config = _with_data(loaded.config, args)
        folder = Path(args.output) if args.output else loaded.report_folder
        if loaded.is_main:
            _claim(folder)

        def report(name: str, result: dict[str, Any], draw: Callable[[Path], None] | None, lines: list[str]) -> None:
            if loaded.is_main:
                result = probes.finite({"checkpoint": str(loaded.folder), "step": loaded.step, **result})
                files = probes.write_report(folder, f"{name}_{loaded.folder.name}", result, draw)
                print("\n".join([*lines, *files]))
                print(json.dumps({**result, "files": files}, allow_nan=False), flush=True)

        yield loaded, report


def _claim(folder: Path) -> None:
    """Makes the folder of results and sees that files can be made in it, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"results cannot be written to {folder}: {error.strerror or error}. Give another folder with --output."
        ) from None


def _with_data(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The run's configuration with the held-out data of the arguments."""
    asked = vars(args)
    values = config.model_dump()
    if asked.get("data"):
        values["data"]["validation"] = [_source(text) for text in args.data]
    if asked.get("windows") is not None:
        values["train"]["eval_windows"] = args.windows
    if asked.get("context_length") is not None:
        values["train"]["context_length"] = args.context_length
        values["train"]["micro_batch_size"] = values["train"]["global_batch_size"] = 1
    config = _validated(RunConfig, **values)
    if "data" in asked and not config.data.validation:
        raise ConfigError("the checkpoint's run names no held-out corpora (data.validation); give --data [NAME=]PATH.")
    return config


def _source(text: str) -> dict[str, Any]:
    name, separator, path = text.rpartition("=")
    return SourceConfig(name=name if separator else Path(path).name, path=path).model_dump()


def _validated(kind: type[Any], **values: Any) -> Any:
    """A section of the configuration from the command line's values."""
    try:
        return kind.model_validate({key: value for key, value in values.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        # What concerns several keys has no place, and all of them for a value.
        given = f"{'.'.join(map(str, first['loc']))}: {first['input']!r:.80} given; " if first["loc"] else ""
        raise ConfigError(f"{given}{reason}.") from None
