"""A curriculum at a glance: one row per stage."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from aria_train.config import DataConfig, RunConfig
from aria_train.stages.checks import Report
from aria_train.stages.stage import Stage, run_root

_NARROWEST = 150
"""Columns of the table where there is no terminal, as in a log file."""


def print_plan(stages: Sequence[Stage], report: Report) -> None:
    """The stages as a table, and what was found about them."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_NARROWEST)
    headings = ("stage", "context", "RoPE base", "tokens", "steps x batch", "learning rate", "mixture", "starts from")
    table = Table(*headings, title=f"curriculum in {run_root(stages)}", title_justify="left", show_lines=True)
    for number, stage in enumerate(stages):
        table.add_row(*_row(stage, stages[number - 1] if number else None))
    console.print(table)
    for title, sentences in (("problem", report.problems), ("missing", report.absent), ("note", report.notes)):
        for sentence in sentences:
            console.print(f"{title:<8} {sentence}", soft_wrap=True, markup=False)


def _row(stage: Stage, before: Stage | None) -> list[str]:
    config, done = stage.config, stage.steps_done()
    total = config.total_steps
    state = "" if not done else "\n[green]done[/green]" if done >= total else f"\n{done:,} of {total:,} steps done"
    return [
        f"[bold]{stage.name}[/bold]{state}",
        short_power(config.train.context_length),
        rope_text(config),
        short(total_tokens(config)),
        f"{total:,} x {config.train.global_batch_size:,}",
        rate_text(config),
        "\n".join(f"{share:>5.1%} {name}" for name, share in mixture(config.data).items()),
        start_text(config, before),
    ]


def total_tokens(config: RunConfig) -> int:
    """Tokens a stage trains on: as it says, or as its steps come to."""
    tokens = config.total_steps * config.tokens_per_step
    return min(tokens, config.train.max_tokens or tokens)


def mixture(data: DataConfig) -> dict[str, float]:
    """Source -> share of the windows."""
    total = sum(source.weight for source in data.train)
    return {source.name: source.weight / total for source in data.train}


def rope_text(config: RunConfig) -> str:
    start = config.schedule.rope_from
    end = short(config.model.rope_base)
    return end if start is None else f"{short(start)} -> {end}\nover {short(config.schedule.rope_tokens)}"


def rate_text(config: RunConfig) -> str:
    peak, schedule = config.optimizer.lr, config.schedule
    if schedule.kind == "constant":
        return f"{_rate(peak)}\nconstant"
    return f"{_rate(peak)} -> {_rate(peak * schedule.min_lr_ratio)}\n{schedule.kind}"


def _rate(value: float) -> str:
    """0.0003 -> 3e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def start_text(config: RunConfig, before: Stage | None) -> str:
    """Where the weights come from."""
    settings = config.checkpoint
    lines = [before.name if before is not None else settings.init_from or "random weights"]
    if before is not None and settings.init_optimizer:
        lines[0] += ", with Adam's moments"
    if settings.init_vision_from:
        lines.append(f"vision: {settings.init_vision_from}")
    if settings.init_fresh:
        lines.append(f"fresh: {', '.join(settings.init_fresh)}")
    if config.train.freeze:
        lines.append(f"frozen: {', '.join(config.train.freeze)}")
    return "\n".join(lines)


def short(value: float) -> str:
    """6400000000000 -> 6.4T, 100000 -> 100K."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def short_power(value: int) -> str:
    """Windows are counted in powers of two: 8192 -> 8K."""
    return f"{value // 1024}K" if value % 1024 == 0 else str(value)
