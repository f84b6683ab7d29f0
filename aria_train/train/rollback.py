"""Back to the weights of the last good checkpoint, after too many bad steps in a row."""

from __future__ import annotations

from aria_train.errors import DivergenceError
from aria_train.parallel import checkpoint
from aria_train.train.guard import Guard
from aria_train.train.state import TrainState


def roll_back(state: TrainState, guard: Guard, home: checkpoint.Folder) -> tuple[int, checkpoint.Folder]:
    """Takes over weights and moments of the newest checkpoint before the bad steps, while the step number stays: the
    data in between is not seen again. Collective. Returns the checkpoint's step and folder.

    Raises DivergenceError where that has not helped before, or cannot be done.
    """
    step = state.step
    bad = f"steps {step - state.guard.streak + 1} to {step} were all skipped"
    advice = (
        "skipped.jsonl in the run directory says why each was. Look at the data there with --replay-step, or lower "
        "optimizer.lr."
    )
    if state.guard.rolled_back_at is not None:
        raise DivergenceError(
            f"{bad}, right after the rollback at step {state.guard.rolled_back_at}: going back does not help. {advice}"
        )
    good, passed = checkpoint.newest_intact(home, before=step, good=True)
    if good is None:
        remarks = [entry.remark for entry in passed]
        raise DivergenceError(" ".join([f"{bad}, and there is no good checkpoint to go back to.", *remarks, advice]))
    state.load(good)
    to_step, state.step = state.step, step
    guard.rolled_back(step, to_step)
    return to_step, good.folder
