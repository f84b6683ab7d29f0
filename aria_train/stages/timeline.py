"""One timeline over all stages of a curriculum: `timeline.jsonl`, and the same as one picture, `timeline.png`.

Both are derived from the stages' own records and written anew each time, so they are always whole and always true.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aria_train.stages.plan import mixture, total_tokens
from aria_train.stages.stage import Stage, run_root
from aria_train.train.metrics import read_metrics


@dataclass
class Track:
    """What is known of one stage. Tokens count from the first stage's first step."""

    stage: Stage
    first_token: int
    """Where the stage begins and ends, as planned."""
    last_token: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    """`stage, step, tokens, loss, lr, context_length, rope_base, mixture` of every optimizer step done."""
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """(tokens, held-out loss) of the evaluations that had held-out data, and gave a finite loss."""


def write_timeline(stages: Sequence[Stage]) -> None:
    """Writes both files into the run root. Without matplotlib, or before any step, there is no picture."""
    tracks = read_tracks(stages)
    root = run_root(stages)
    root.mkdir(parents=True, exist_ok=True)
    aside = root / "timeline.jsonl.new"
    with aside.open("w", encoding="utf-8") as file:
        for track in tracks:
            file.writelines(json.dumps(step) + "\n" for step in track.steps)
    os.replace(aside, root / "timeline.jsonl")
    if any(track.steps for track in tracks):
        try:
            from aria_train.stages.picture import save_picture
        except ImportError:
            return
        save_picture(tracks, root / "timeline.png")


def read_tracks(stages: Sequence[Stage]) -> list[Track]:
    """The stages' records, laid end to end."""
    tracks = []
    first = 0
    for stage in stages:
        config = stage.config
        track = Track(stage, first, first + total_tokens(config))
        shares = {name: round(share, 4) for name, share in mixture(config.data).items()}
        for line in read_metrics(stage.run_dir / "metrics.jsonl"):
            track.steps.append(
                {
                    "stage": stage.name,
                    "step": line["step"],
                    "tokens": first + line["tokens"],
                    "loss": line["loss"],
                    "lr": line["lr"],
                    "context_length": config.train.context_length,
                    "rope_base": config.rope_base_at(line["tokens"] - config.tokens_per_step),
                    "mixture": shares,
                }
            )
        for line in read_metrics(stage.run_dir / "evaluations.jsonl"):
            if line.get("loss") is not None:
                track.evaluations.append((first + line["tokens"], line["loss"]))
        tracks.append(track)
        first = track.last_token
    return tracks
