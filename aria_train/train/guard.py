"""Bad batches: a step whose loss or gradient is not finite, or whose gradient norm is far out, changes nothing.

A skipped step counts: the data and the schedule move on, while weights, moments and routing loads stay as they are to
the bit. After `rollback_after` skipped steps in a row the weights themselves are suspected, and the run goes back to
those of the last good checkpoint. The step number does not go back: the data between is not seen again.

All of it is decided from figures that every rank has, and remembered in the checkpoint's manifest. So ranks agree,
and a run that was interrupted decides the same again.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from aria_train.config import GuardConfig


@dataclass
class GuardState:
    """What a resume needs to know."""

    skipped: int = 0
    """Steps so far that no update is left of: skipped, or undone by a rollback."""
    streak: int = 0
    """Steps skipped in a row, up to now."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last updates, oldest first."""
    rolled_back_at: int | None = None
    """Step of the last rollback, until an update follows it."""


class Guard:
    """Judges steps; `state` belongs to the training state."""

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config, self.state = config, state

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must change nothing; None if it may. Remembers the verdict."""
        reason = self._reason(loss, grad_norm)
        state = self.state
        if reason is None:
            state.streak, state.rolled_back_at = 0, None
            if self.config.spike_sigmas:
                state.norms = [*state.norms, grad_norm][-self.config.spike_window :]
        else:
            state.skipped += 1
            state.streak += 1
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        norms = self.state.norms
        if self.config.spike_sigmas and len(norms) >= self.config.spike_window:
            mean, sigma = statistics.fmean(norms), statistics.pstdev(norms)
            if grad_norm > mean + self.config.spike_sigmas * sigma:
                far = (grad_norm - mean) / sigma if sigma else math.inf
                return f"the gradient norm {grad_norm:.4g} is {far:.1f} sigmas above the last {len(norms)}"
        return None

    @property
    def wants_rollback(self) -> bool:
        return self.state.streak >= self.config.rollback_after

    def rolled_back(self, step: int, to_step: int) -> None:
        """The state is now that of an earlier step's checkpoint, while the run stays at `step`."""
        self.state.skipped += step - to_step
        self.state.streak = 0
        self.state.rolled_back_at = step
