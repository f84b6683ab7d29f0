"""`aria-train train CONFIG --replay-step N`: takes one step of a run again, looking closely, and changes nothing.

The run is retraced from the newest checkpoint before the step, at the same layout bit by bit (on a GPU but for the
order in which attention adds gradients up), so a step that was skipped is skipped again for the same reason; and each
window of its batch is looked at by itself.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import torch

from aria_train.batch import MicroBatch
from aria_train.config import RunConfig
from aria_train.errors import ConfigError
from aria_train.parallel.collectives import gather_objects
from aria_train.parallel.shard import release_parameters
from aria_train.train.trainer import Trainer

_SHOWN = 10


def replay_step(config: RunConfig, step: int) -> None:
    """Prints the step's metrics, its verdict, and its windows with the highest losses. Collective.

    The last line of output is all of it as JSON.
    """
    if not 1 <= step <= config.total_steps:
        raise ConfigError(f"--replay-step {step}: the run has steps 1 to {config.total_steps}.")
    trainer = Trainer(config, replay_step=step)
    say = trainer.console.message
    trainer.console.start(trainer.state.step)
    if trainer.state.step < step - 1:
        since = f"step {trainer.state.step}" if trainer.state.step else "the beginning: there is no earlier checkpoint"
        say(f"retracing {step - 1 - trainer.state.step:,} steps from {since}")
    try:
        while trainer.state.step < step - 1:
            trainer.advance(next(trainer.loader))
        batches = next(trainer.loader)
        windows = [window for part in gather_objects(_windows(trainer, batches)) for window in part]
        metrics = trainer.advance(batches)
    finally:
        trainer.close()
    if not trainer.is_main:
        return
    say(f"step {step}: loss {metrics['loss']:.6f}, gradient norm {metrics['grad_norm']:.6f}")
    say(f"verdict: {metrics.get('skipped', 'taken')}")
    windows.sort(key=lambda window: (math.isfinite(window["loss"]), -window["loss"]))
    for window in windows[:_SHOWN]:
        where = f"window {window['window']} ({window['source']}, position {window['position']})"
        say(f"  {where}: loss {window['loss']:.4f} over {window['targets']} targets, {window['documents']} documents")
    print(json.dumps({"metrics": metrics, "windows": windows}), flush=True)


@torch.no_grad()
def _windows(trainer: Trainer, batches: list[MicroBatch]) -> list[dict[str, Any]]:
    """Each window of this rank's share of the next step: where it came from and its mean loss. Collective."""
    blend, rank, world = trainer.loader.blend, trainer.meshes.rank, trainer.meshes.world_size
    config = trainer.config
    batch_size = config.train.global_batch_size
    trainer.state.model.rope_base = config.rope_base_at(trainer.state.step * config.tokens_per_step)
    numbers = itertools.count(trainer.state.step * batch_size + rank * (batch_size // world))
    found = []
    for batch in batches:
        output = trainer.state.model(batch.to(trainer.device))
        assert batch.target_positions is not None
        losses, targets = torch.zeros(2, batch.num_tokens)
        losses[batch.target_positions] = output.token_losses.float().cpu()
        targets[batch.target_positions] = 1
        begin = document = 0
        for number in itertools.islice(numbers, config.train.micro_batch_size):
            which, position = blend.locate(number)
            documents = len(blend.sources[which].read(position).document_lengths)
            document += documents
            end = int(batch.starts[document])
            count = int(targets[begin:end].sum())
            found.append(
                {
                    "window": number,
                    "source": blend.sources[which].name,
                    "position": position,
                    "documents": documents,
                    "targets": count,
                    "loss": float(losses[begin:end].sum()) / max(1, count),
                }
            )
            begin = end
    release_parameters(trainer.state.model)
    return found
