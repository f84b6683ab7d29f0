"""The demo's report: one HTML page that holds all its pictures, to be opened from anywhere and sent to anyone."""

from __future__ import annotations

import base64
import html
import os
import platform
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from aria_train.stages.plan import short
from aria_train.train.metrics import read_metrics
from demo.pictures import save_source_losses
from demo.samples import read_samples
from demo.summary import LANGUAGE, LONG, MULTIMODAL, POST, STAGES, Summary

TITLES = {
    LANGUAGE: "Stage 1: language",
    MULTIMODAL: "Stage 2: text and images",
    LONG: "Stage 3: long context",
    POST: "Stage 4: post-training",
}


def write_report(root: Path, summary: Summary, command: str) -> Path:
    """Writes `root/report/index.html` from what the finished stages left in `root`."""
    page = root / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    losses = page.parent / "losses.png"
    save_source_losses(root, losses)
    first, second, third, fourth = (summary[name] for name in STAGES)
    context = int(third["context_length"])
    sections = [
        _section(
            "The whole run",
            "Loss, learning rate, context, RoPE base and mixture over all tokens of the four stages.",
            _picture(root / "timeline.png", "timeline of the four stages"),
        ),
        _section("What it cost", "", _table(("stage", "tokens", "steps", "time", "tokens/s"), _costs(root))),
        _section(
            TITLES[LANGUAGE],
            f"Python sources and their docstrings, in windows of 256 tokens. Held-out loss fell from "
            f"{first['heldout_loss_before']:.2f} to {first['heldout_loss_after']:.2f} nats per token; counting pairs "
            f"of tokens in the same corpus gives {first['bigram_loss']:.2f}.",
            _picture(root / LANGUAGE / "report" / "loss.png", "loss of stage 1", "narrow"),
        ),
        _section(
            TITLES[MULTIMODAL],
            f"Held-out handwritten digits read right: {second['digits_accuracy_before']:.1%} before, "
            f"{second['digits_accuracy_after']:.1%} after, while held-out text went from "
            f"{second['heldout_text_loss_before']:.2f} to {second['heldout_text_loss_after']:.2f} nats per token.",
            _digits(summary),
            _picture(newest(root / MULTIMODAL, "answers"), "digits with the model's answers", "narrow"),
        ),
        _section(
            "Which experts see",
            "For every layer and routed expert: how much more often visual tokens choose it than text tokens do, after "
            "stage 2 (R_v / R_t, capped at 50), by kind of data.",
            _picture(newest(root / MULTIMODAL, "experts"), "specialisation of experts", "narrow"),
        ),
        _section(
            TITLES[LONG],
            f"Windows of {context:,} tokens, RoPE base 100K to 5M. Facts hidden in held-out text, found before and "
            f"after: {third['needle_accuracy_before']:.1%} and {third['needle_accuracy_after']:.1%} of those in up to "
            f"{context:,} tokens. `make needle` trains longer on this.",
            _pair(
                ("before stage 3", oldest(root / LONG, "needle_text")),
                ("after stage 3", newest(root / LONG, "needle_text")),
            ),
        ),
        _section(
            TITLES[POST],
            f"Instructions that no earlier stage gave, about held-out digits; loss on the answers alone. Followed to "
            f"the word: {fourth['answer_accuracy_before']:.1%} before, {fourth['answer_accuracy_after']:.1%} after.",
            _pair(
                ("before stage 4", oldest(root / POST, "answers")),
                ("after stage 4", newest(root / POST, "answers")),
            ),
        ),
        _section(
            "Held-out loss of every source",
            "Nats per token over all stages. A source that a stage does not list is not measured there.",
            _picture(losses, "held-out loss by source"),
        ),
        _section(
            "What it writes",
            "The same prompts after each stage, sampled at temperature 0.7 (top-p 0.9).",
            *(_samples(root / name, TITLES[name]) for name in STAGES),
        ),
    ]
    cards = (
        (f"{first['heldout_loss_after']:.2f}", f"nats per held-out token, from {first['heldout_loss_before']:.2f}"),
        (f"{second['digits_accuracy_after']:.0%}", "of held-out digits read right after stage 2"),
        (f"{third['needle_accuracy_after']:.0%}", f"of hidden facts found in up to {context:,} tokens"),
        (f"{fourth['answer_accuracy_after']:.0%}", "of instructions followed to the word"),
    )
    content = _PAGE.substitute(
        cards="".join(f"<div class=card><b>{value}</b>{html.escape(words)}</div>" for value, words in cards),
        sections="\n".join(sections),
        command=html.escape(command),
        machine=html.escape(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"),
    )
    aside = page.with_suffix(".new")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, page)
    return page


def newest(run_dir: Path, kind: str) -> Path:
    """The last picture of its kind that an evaluation left."""
    return _pictures(run_dir, kind)[-1]


def oldest(run_dir: Path, kind: str) -> Path:
    """The first, made before any step."""
    return _pictures(run_dir, kind)[0]


def _pictures(run_dir: Path, kind: str) -> list[Path]:
    return sorted((run_dir / "report").glob(f"{kind}_step_*.png"))


def _costs(root: Path) -> Iterable[Sequence[str]]:
    total_tokens = total_seconds = 0.0
    for name in STAGES:
        steps = read_metrics(root / name / "metrics.jsonl")
        seconds, tokens = sum(step["step_seconds"] for step in steps), steps[-1]["tokens"]
        total_tokens, total_seconds = total_tokens + tokens, total_seconds + seconds
        yield TITLES[name], short(tokens), f"{len(steps):,}", _duration(seconds), f"{tokens / seconds:,.0f}"
    yield "together", short(total_tokens), "", _duration(total_seconds), f"{total_tokens / total_seconds:,.0f}"


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _digits(summary: Summary) -> str:
    """Accuracy on the held-out digits after each stage that sees, as bars."""
    shares = {
        "before stage 2": summary[MULTIMODAL]["digits_accuracy_before"],
        "after stage 2": summary[MULTIMODAL]["digits_accuracy_after"],
        "after stage 3": summary[LONG]["digits_accuracy_after"],
        "after stage 4": summary[POST]["digits_accuracy_after"],
    }
    return _bars("Held-out digits read right", shares)


def _bars(title: str, shares: Mapping[str, float]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td class=bar><i style='width:{share:.1%}'></i><td class=number>{share:.1%}"
        for name, share in shares.items()
    )
    return f"<table class=bars><caption>{html.escape(title)}</caption>{rows}</table>"


def _samples(run_dir: Path, title: str) -> str:
    pairs = "".join(
        f"<pre><span>{html.escape(prompt)}</span>{html.escape(said)}</pre>" for prompt, said in read_samples(run_dir)
    )
    return f"<h3>{html.escape(title)}</h3><div class=pair>{pairs}</div>"


def _section(title: str, text: str, *parts: str) -> str:
    words = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{words}{''.join(parts)}</section>"


def _pair(*pictures: tuple[str, Path]) -> str:
    figures = (
        f"<figure>{_picture(path, name)}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, path in pictures
    )
    return f"<div class=pair>{''.join(figures)}</div>"


def _picture(path: Path, what: str, shape: str = "wide") -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img class={shape} alt='{html.escape(what, quote=True)}' src='data:image/png;base64,{data}'>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Aria in four stages</title>
<style>
:root { color-scheme: light; --ink: #1f2933; --soft: #5f7282; --rule: #d9e1e7; --accent: #2f6fa7 }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #f5f7f9; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1rem }
h1 { font-size: 2rem; margin: 0 0 .3rem } h2 { font-size: 1.3rem; margin: 0 0 .4rem } h3 { margin: 1.2rem 0 .3rem }
p { max-width: 46rem; margin: .3rem 0 1rem }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px; padding: 1.4rem; margin: 1.2rem 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1rem; margin: 1.4rem 0 }
.card { background: #fff; border: 1px solid var(--rule); border-radius: 10px; padding: 1rem; color: var(--soft) }
.card b { display: block; font-size: 1.9rem; color: var(--accent) }
img { display: block; max-width: 100%; margin: .6rem auto } img.narrow { max-width: min(100%, 760px) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; align-items: start }
figure { margin: 0 } figcaption { text-align: center; color: var(--soft) }
table { border-collapse: collapse; margin: .6rem 0 } th, td { text-align: right; padding: .25rem .9rem }
th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left; padding-left: 0 } table tr:last-child td { font-weight: 600 }
.bars { width: 100%; max-width: 640px } .bars caption { text-align: left; font-weight: 600 }
.bars tr:last-child td { font-weight: inherit } .bar { width: 100% }
.bar i { display: block; height: 1.1rem; border-radius: 3px; background: var(--accent) }
pre { background: #f5f7f9; border-radius: 8px; padding: .9rem; margin: 0; font-size: .8rem; line-height: 1.4 }
pre { white-space: pre-wrap; overflow-wrap: anywhere } pre span { color: var(--soft) }
code { background: #eef2f5; border-radius: 4px; padding: .1rem .35rem } footer { color: var(--soft) }
</style></head><body><main>
<h1>Aria in four stages</h1>
<p>A small model of Aria's architecture, from random weights through language, images, long context and instructions,
trained on this machine by <code>$command</code>.</p>
<div class=cards>$cards</div>
$sections
<footer>$machine</footer>
</main></body></html>
""")
