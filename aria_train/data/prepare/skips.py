"""What preparation could not use, and why; and the refusal to write a corpus that nothing is in."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aria_train.data.prepare.text_inputs import Skipped, printable
from aria_train.errors import DataError

EXAMPLES_PER_REASON = 5


@dataclass
class SkipReport:
    """Documents not used, by reason, with the first few places of each."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, skipped: Skipped, lines_before: int = 0) -> None:
        """`lines_before`: lines of the same file in earlier units."""
        self.counts[skipped.reason] += 1
        examples = self.examples.setdefault(skipped.reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            line = "" if skipped.line is None else f":{skipped.line + lines_before}"
            examples.append(f"{printable(skipped.path)}{line}" + (f" ({skipped.detail})" if skipped.detail else ""))

    def as_json(self) -> dict[str, Any]:
        return {
            reason: {"documents": count, "examples": self.examples[reason]}
            for reason, count in self.counts.most_common()
        }

    def __str__(self) -> str:
        """Each reason, how often, and the first place."""
        return "; ".join(
            f"{count:,} x {reason}, such as {self.examples[reason][0]}" for reason, count in self.counts.items()
        )


def refuse_empty(
    counts: Mapping[str, int], what: str, paths: Sequence[str], skips: SkipReport, holdout_fraction: float = 0.0
) -> None:
    """Raises DataError if a corpus, by its suffix, got no document or sample (`what`) from the files."""
    total = sum(counts.values())
    if not total:
        raise DataError(
            f"no {what} could be made from {len(paths):,} file(s), {paths[0]} first; nothing was written. Skipped: "
            f"{skips if skips.counts else 'nothing: the files are empty'}."
        )
    for suffix, count in counts.items():
        if not count:
            raise DataError(
                f"--holdout-fraction {holdout_fraction}: of {total:,} {what}s none fell into the "
                f"{'validation' if suffix else 'training'} part; nothing was written. Choose a "
                f"{'larger' if suffix else 'smaller'} fraction."
            )
