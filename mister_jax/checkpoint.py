"""Checkpoints of a training run: the latest state and best parameters, written with Orbax.

A checkpoint is written atomically, so a run may be killed at any moment. Orbax is imported by the
first `Checkpoints`, because it takes a second.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from mister_jax.errors import InputError

LATEST, BEST = "latest", "best"
_STATE, _PROGRESS = "state", "progress"

OnSave = Callable[[str, int, Any, dict[str, Any]], None]


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, the newest of each kind.

    Use it as a context manager: on exit it waits for checkpoints that are still being written.

    Args:
      workdir: Work directory of the training run.
      read_only: Whether only to read. A reader must not remove the unfinished checkpoint of a
        killed run, because another process may be writing it.
      on_save: Called with the arguments of `save` after a checkpoint has been started.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        read_only: bool = False,
        on_save: OnSave | None = None,
    ):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_is_relevant)
        self._directory = epath.Path(workdir).absolute() / "checkpoints"
        self._options = (
            ocp.CheckpointManagerOptions(read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        )
        self._on_save = on_save or (lambda kind, step, state, progress: None)
        self._managers: dict[str, Any] = {}
        self._ocp = ocp

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        for manager in self._managers.values():
            manager.close()

    def save(self, kind: str, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts writing a checkpoint. The arrays may be donated as soon as this returns.

        An existing checkpoint of the same step is kept: a resumed run repeats the steps after its
        checkpoint bit for bit and would write the same values.

        Args:
          kind: `LATEST` or `BEST`.
          step: Number of completed training steps.
          state: Tree of arrays.
          progress: JSON values saved with the state.
        """
        manager = self._manager(kind)
        if step not in manager.all_steps():
            # A complete latest state must imply a complete best checkpoint before it.
            for other in self._managers.values():
                other.wait_until_finished()
            items = {
                _STATE: self._ocp.args.StandardSave(state),
                _PROGRESS: self._ocp.args.JsonSave(progress),
            }
            manager.save(step, args=self._ocp.args.Composite(**items))
        self._on_save(kind, step, state, progress)

    def restore(self, kind: str, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint of a kind.

        Args:
          kind: `LATEST` or `BEST`.
          like: Arrays or shapes with the shardings to restore to.

        Returns:
          The state and its progress, or None if there is no checkpoint.

        Raises:
          InputError: The checkpoint is damaged or holds other arrays.
        """
        if not (self._directory / kind).exists():
            return None
        manager = self._manager(kind)
        manager.wait_until_finished()
        step = manager.latest_step()
        if step is None:
            return None
        items = {
            _STATE: self._ocp.args.StandardRestore(jax.tree.map(_abstract_array, like)),
            _PROGRESS: self._ocp.args.JsonRestore(),
        }
        with _silence_unfinished_reads():
            try:
                restored = manager.restore(step, args=self._ocp.args.Composite(**items))
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files.
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"{self._directory / kind / str(step)}: the checkpoint is damaged or of "
                    f"another model ({reason}); remove it, or use another workdir"
                ) from error
        return restored[_STATE], restored[_PROGRESS]

    def _manager(self, kind: str) -> Any:
        if kind not in self._managers:
            self._managers[kind] = self._ocp.CheckpointManager(
                self._directory / kind, options=self._options
            )
        return self._managers[kind]


def _is_relevant(record: logging.LogRecord) -> bool:
    """Filters Orbax's warnings, which it logs for every save and for damaged metadata.

    Orbax continues without the metadata; if it cannot, its exception says so.
    """
    if "orbax" not in record.pathname:
        return True
    return record.levelno >= logging.ERROR and "Failed to json parse" not in str(record.msg)


def _abstract_array(value: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(value, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


@contextlib.contextmanager
def _silence_unfinished_reads() -> Iterator[None]:
    """Silences the messages of the concurrent reads that a failed restore leaves behind.

    Orbax does not cancel them. They fail long after the restore, when their event loop is closed,
    and asyncio prints several lines about each after the one-line error. Python has no other hook
    for them, so on failure the hook stays.
    """
    asyncio_messages = ("Event loop is closed", "was never awaited")
    asyncio_logger = logging.getLogger("asyncio")
    previous_hook, previous_level = sys.unraisablehook, asyncio_logger.level

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not str(unraisable.exc_value).endswith(asyncio_messages):
            previous_hook(unraisable)

    ignored_warnings = warnings.catch_warnings()
    ignored_warnings.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = hook
    asyncio_logger.setLevel(logging.CRITICAL)
    yield
    # Reached only on success.
    ignored_warnings.__exit__(None, None, None)
    sys.unraisablehook = previous_hook
    asyncio_logger.setLevel(previous_level)
