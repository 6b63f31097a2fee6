"""What a work directory keeps of a training: the latest state, and the best parameters.

The one user of Orbax. A checkpoint appears whole or not at all, so a run may be killed at any
moment.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mister_jax.errors import InputError

LATEST, BEST = "latest", "best"
_STATE, _PROGRESS = "state", "progress"


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`, of which each kind keeps its newest.

    Use it as a context: leaving it waits for what is still being written.

    Args:
      workdir: of the training.
      read_only: nothing will be saved. A training must say False: it then removes what a killed one
        left half-written, which beside a running one is what that is writing.
    """

    def __init__(self, workdir: epath.PathLike, *, read_only: bool = False):
        logging.getLogger("absl").addFilter(_is_worth_telling)
        self._directory = epath.Path(workdir).absolute() / "checkpoints"
        self._options = (
            ocp.CheckpointManagerOptions(read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        )
        self._managers: dict[str, ocp.CheckpointManager] = {}

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        for manager in self._managers.values():
            manager.close()

    def save(self, kind: str, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Begins to save; the arrays may be donated at once afterwards.

        A step that is there already is left alone: a resumed run repeats the steps after its
        checkpoint bit for bit, so it would write the same again.

        Args:
          kind: `LATEST` or `BEST`.
          step: of the training.
          state: arrays.
          progress: what else belongs to the step, plain JSON values.
        """
        manager = self._manager(kind)
        if step in manager.all_steps():
            return
        # A latest state that is whole may count on the best one it tells of.
        for other in self._managers.values():
            other.wait_until_finished()
        items = {
            _STATE: ocp.args.StandardSave(state),
            _PROGRESS: ocp.args.JsonSave(progress),
        }
        manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, kind: str, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint of a kind.

        Args:
          kind: `LATEST` or `BEST`.
          like: arrays or shapes, with the shardings to restore to.

        Returns:
          The state and its progress, or None if there is no checkpoint.

        Raises:
          InputError: there is one, but it cannot be read, or holds other arrays.
        """
        if not (self._directory / kind).exists():
            return None
        manager = self._manager(kind)
        manager.wait_until_finished()
        step = manager.latest_step()
        if step is None:
            return None
        items = {
            _STATE: ocp.args.StandardRestore(jax.tree.map(_abstract, like)),
            _PROGRESS: ocp.args.JsonRestore(),
        }
        with _quiet_failure():
            try:
                restored = manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"{self._directory / kind / str(step)}: the checkpoint is damaged or of "
                    f"another model ({reason}); remove it, or use another workdir"
                ) from error
        return restored[_STATE], restored[_PROGRESS]

    def _manager(self, kind: str) -> ocp.CheckpointManager:
        if kind not in self._managers:
            self._managers[kind] = ocp.CheckpointManager(
                self._directory / kind, options=self._options
            )
        return self._managers[kind]


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Not what Orbax announces of every save, at warning level; nor that its notes are damaged.

    It goes on without them, and where it cannot, the error says so.
    """
    if "orbax" not in record.pathname:
        return True
    return record.levelno >= logging.ERROR and "Failed to json parse" not in str(record.msg)


def _abstract(value: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(value, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


@contextlib.contextmanager
def _quiet_failure() -> Iterator[None]:
    """Keeps quiet the reads that a failed restore leaves behind.

    They end after their event loop has closed, some long after the failure, and others never begin;
    each would print something about that around the one line that says what is wrong.
    """
    left_behind = ("Event loop is closed", "was never awaited")
    logger = logging.getLogger("asyncio")
    previous, level = sys.unraisablehook, logger.level

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not str(unraisable.exc_value).endswith(left_behind):
            previous(unraisable)

    ignoring = warnings.catch_warnings()
    ignoring.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = hook
    logger.setLevel(logging.CRITICAL)
    yield
    # Not after a failure: what was left behind still has to end.
    ignoring.__exit__(None, None, None)
    sys.unraisablehook = previous
    logger.setLevel(level)
