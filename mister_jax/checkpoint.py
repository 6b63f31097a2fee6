"""Orbax checkpoints of a training run: the latest state and the best parameters.

Checkpoints are written atomically, so a run may be killed at any moment. Importing Orbax takes a
second, so Orbax is imported only when a `Checkpoints` object is created.
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

# In a run with a single process, a write fails after this many seconds. They include pauses, for
# example while Slurm suspends the job or a laptop sleeps, so Orbax's 20 minutes are too short.
_WRITE_TIMEOUT = 7 * 24 * 3600

OnSave = Callable[[str, int, Any, dict[str, Any]], None]


class Checkpoints:
    """Reads and writes checkpoints in `workdir/checkpoints`, and keeps the newest of each kind.

    A run resumes from its `LATEST` checkpoint, and then needs the best parameters up to that step.
    When a new `BEST` checkpoint is saved, the previous one is therefore kept until the next
    `LATEST` checkpoint is complete.

    Use this class as a context manager. On exit, the context manager waits for checkpoints that are
    still being written.

    Args:
      workdir: Work directory of the training run.
      read_only: Whether to disable writing. If False, unfinished checkpoints of a killed run are
        removed. A reader must keep unfinished checkpoints, because another process may still be
        writing them.
      on_save: Function called with the arguments of `save` once the write has started, or at once
        if the checkpoint exists.
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
        self._read_only = read_only
        self._on_save = on_save or (lambda kind, step, state, progress: None)
        self._managers: dict[str, Any] = {}
        self._ocp = ocp

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        # `_wait` may delete a checkpoint. Deletion waits for all processes, and would therefore
        # block a process that has failed.
        if error_type is None:
            self._wait()
        for manager in self._managers.values():
            manager.close()

    def save(self, kind: str, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays may be donated once this method has returned.

        An existing checkpoint of this step is kept.

        Args:
          kind: `LATEST` or `BEST`.
          step: Number of completed training steps.
          state: Tree of arrays.
          progress: JSON values to save with the state.
        """
        manager = self._manager(kind)
        if step not in manager.all_steps():
            # A run resumes from its latest checkpoint, and does not repeat earlier steps. A best
            # checkpoint from an earlier step must therefore be complete before the latest
            # checkpoint is complete.
            self._wait()
            items = {
                _STATE: self._ocp.args.StandardSave(state),
                _PROGRESS: self._ocp.args.JsonSave(progress),
            }
            manager.save(step, args=self._ocp.args.Composite(**items))
        self._on_save(kind, step, state, progress)

    def delete_best_after(self, step: int) -> None:
        """Deletes best checkpoints from later steps, which a resumed run will repeat.

        The repeated steps have other results if, for example, the number of epochs is changed.
        """
        if (self._directory / BEST).exists():
            manager = self._manager(BEST)
            for saved_step in manager.all_steps():
                if saved_step > step:
                    manager.delete(saved_step)

    def _wait(self) -> None:
        """Waits for all writes, and then deletes checkpoints that are no longer needed."""
        for manager in self._managers.values():
            manager.wait_until_finished()
        if self._read_only or LATEST not in self._managers:
            return
        # Orbax deletes the previous checkpoint, unless the run is killed just before.
        latest_steps = sorted(self._managers[LATEST].all_steps())
        for step in latest_steps[:-1]:
            self._managers[LATEST].delete(step)
        if BEST in self._managers:
            latest_step = latest_steps[-1] if latest_steps else 0
            steps = [step for step in self._managers[BEST].all_steps() if step <= latest_step]
            for step in sorted(steps)[:-1]:
                self._managers[BEST].delete(step)

    def restore(self, kind: str, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint of a kind.

        Args:
          kind: `LATEST` or `BEST`.
          like: Tree of arrays or shapes, with the shardings of the restored arrays.

        Returns:
          The state and the progress saved with it, or None if there is no checkpoint.

        Raises:
          InputError: The checkpoint is damaged, or its arrays do not match `like`.
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
            except Exception as error:  # Damaged files raise many types of exceptions.
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"{self._directory / kind / str(step)}: the checkpoint is damaged or belongs "
                    f"to another model ({reason}); remove it, or use another workdir"
                ) from error
        return restored[_STATE], restored[_PROGRESS]

    def progress(self, kind: str) -> dict[str, Any] | None:
        """Reads only the progress of the newest checkpoint of a kind; None if there is none.

        Raises:
          InputError: The checkpoint is damaged.
        """
        if not (self._directory / kind).exists():
            return None
        manager = self._manager(kind)
        step = manager.latest_step()
        if step is None:
            return None
        try:
            items = {_PROGRESS: self._ocp.args.JsonRestore()}
            progress: dict[str, Any] = manager.restore(
                step, args=self._ocp.args.Composite(**items)
            )[_PROGRESS]
        except Exception as error:  # Damaged files raise many types of exceptions.
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self._directory / kind / str(step)}: the checkpoint is damaged ({reason})"
            ) from error
        return progress

    def _manager(self, kind: str) -> Any:
        if kind not in self._managers:
            options: dict[str, Any] = {"read_only": True}
            if not self._read_only:
                max_to_keep = 2 if kind == BEST else 1
                options = {"max_to_keep": max_to_keep, "cleanup_tmp_directories": True}
                if jax.process_count() == 1:
                    # Waiting for directories that are created in the background could time out.
                    options["async_options"] = self._ocp.AsyncOptions(
                        timeout_secs=_WRITE_TIMEOUT, create_directories_asynchronously=False
                    )
            self._managers[kind] = self._ocp.CheckpointManager(
                self._directory / kind, options=self._ocp.CheckpointManagerOptions(**options)
            )
        return self._managers[kind]


def _is_relevant(record: logging.LogRecord) -> bool:
    """Filters out Orbax's messages below level ERROR, and its errors about damaged metadata.

    After such an error, Orbax continues without the metadata or raises an exception.
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
    """Silences the messages about reads that are still running when a restore fails.

    Orbax does not cancel these reads. They fail later, when the event loop is closed or Python
    deletes their coroutines, and several lines would be printed for each read after the one-line
    error. The messages therefore stay silenced if the restore fails.
    """
    asyncio_messages = ("Event loop is closed", "was never awaited")
    asyncio_logger = logging.getLogger("asyncio")
    previous_hook, previous_level = sys.unraisablehook, asyncio_logger.level

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        is_read = code is not None and "orbax" in code.co_filename
        if not is_read and not str(unraisable.exc_value).endswith(asyncio_messages):
            previous_hook(unraisable)

    ignored_warnings = warnings.catch_warnings()
    ignored_warnings.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = hook
    asyncio_logger.setLevel(logging.CRITICAL)
    yield
    # This line is reached only on success.
    ignored_warnings.__exit__(None, None, None)
    sys.unraisablehook = previous_hook
    asyncio_logger.setLevel(previous_level)
