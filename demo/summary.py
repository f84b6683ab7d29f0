"""What the demo's four stages learned, in figures from the runs' own records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aria_train.config import RunConfig
from aria_train.data.loader import validation_batches
from aria_train.data.text.ngram import NgramModel
from aria_train.train.metrics import read_metrics

LANGUAGE, MULTIMODAL, LONG, POST = STAGES = ("stage1_lang", "stage2_mm", "stage3_longctx", "stage4_post")

Summary = dict[str, dict[str, float]]
"""Stage -> figure -> value; what `summary.json` holds."""


@dataclass
class LanguageSummary:
    """Mean cross-entropies of the same held-out tokens, in nats per token."""

    heldout_loss_before: float
    heldout_loss_after: float
    unigram_loss: float
    bigram_loss: float


@dataclass
class MultimodalSummary:
    """Share of held-out handwritten digits read right, and held-out text loss in nats per token."""

    digits_accuracy_before: float
    digits_accuracy_after: float
    heldout_text_loss_before: float
    heldout_text_loss_after: float


@dataclass
class LongSummary:
    """Share of the facts that are found in haystacks of up to the context, and of digits still read right."""

    needle_accuracy_before: float
    needle_accuracy_after: float
    context_length: int
    digits_accuracy_after: float


@dataclass
class PostSummary:
    """Share of held-out instructions followed to the word, and of digits still read right."""

    answer_accuracy_before: float
    answer_accuracy_after: float
    digits_accuracy_after: float


def summarise(root: Path, ngrams: tuple[float, float], long_context: int, digits_accuracy: float) -> Summary:
    """From each run's evaluations before its first step and after its last.

    `digits_accuracy` is that of the last stage, whose own evaluations are of instructions.
    """
    ends = {name: (lines[0], lines[-1]) for name in STAGES if (lines := evaluations(root / name))}
    accuracy, text, needles = "answers_accuracy", "loss/text", "needle_text_accuracy"
    before, after = ends[LANGUAGE]
    first = LanguageSummary(before["loss"], after["loss"], *ngrams)
    before, after = ends[MULTIMODAL]
    second = MultimodalSummary(before[accuracy], after[accuracy], before[text], after[text])
    before, after = ends[LONG]
    third = LongSummary(before[needles], after[needles], long_context, after[accuracy])
    before, after = ends[POST]
    fourth = PostSummary(before[accuracy], after[accuracy], digits_accuracy)
    return {LANGUAGE: asdict(first), MULTIMODAL: asdict(second), LONG: asdict(third), POST: asdict(fourth)}


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """A run's `evaluations.jsonl`; an interruption may have repeated a line, of which the last counts."""
    return list({line["step"]: line for line in read_metrics(run_dir / "evaluations.jsonl")}.values())


def ngram_losses(config: RunConfig) -> tuple[float, float]:
    """Unigram and bigram models of the training corpora, scored on the run's held-out tokens."""
    paths = [source.path for source in config.data.train]
    corpora = [path for entry in paths for path in ([entry] if isinstance(entry, str) else entry)]
    scores = NgramModel.from_corpora(corpora, config.model.vocab_size).score(validation_batches(config))
    return scores.unigram, scores.bigram
