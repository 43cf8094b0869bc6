"""The checkpoints of a run whose tasks are no masks alone: weights and scores, as pytrees."""

from typing import Any

import orbax.checkpoint as ocp

from experiments.frame.run import Run, UsageError

FOLDER = "checkpoints"


def manager(run: Run) -> ocp.CheckpointManager:
    """The checkpoints in a run's folder, of which the last ones are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((run.out / FOLDER).resolve(), options=options)


def save(saved: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Keeps a pytree of arrays as that of `step`."""
    saved.save(step, args=ocp.args.StandardSave(state))


def restored(saved: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The pytree of `step`, of arrays like these. Raises UsageError where it cannot be read."""
    try:
        return saved.restore(step, args=ocp.args.StandardRestore(like))
    except Exception as error:  # of whatever kind, which its reader does not say
        raise UsageError(
            f"{saved.directory / str(step)} is damaged ({type(error).__name__}): delete "
            f"{saved.directory}, and the run learns its tasks anew"
        ) from error
