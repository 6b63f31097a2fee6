"""Stops training after SIGTERM or Ctrl-C, at a step at which the state can be saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

_STDERR = 2  # file descriptor
_CTRL_C_MESSAGE = (
    b"\nstopping after this step and saving the state; press Ctrl-C again to stop immediately\n"
)


class StopRequest:
    """Request to stop training after the current step.

    Attributes:
      event: Event that is set when training should stop.
      by_ctrl_c: Whether Ctrl-C has requested the stop.
      is_training: Whether steps are running. If not, there is nothing to save, and Ctrl-C raises
        KeyboardInterrupt immediately.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.by_ctrl_c = False
        self.is_training = False

    @property
    def signal_name(self) -> str:
        """Name of the signal, for messages."""
        return "Ctrl-C" if self.by_ctrl_c else "SIGTERM"

    def _on_ctrl_c(self, number: int, frame: object) -> None:
        if self.by_ctrl_c or not self.is_training:
            raise KeyboardInterrupt
        self.by_ctrl_c = True
        self.event.set()
        # In a signal handler, `print` may fail, because the signal may have interrupted a `print`.
        with contextlib.suppress(OSError):  # The reader of a pipe may have exited.
            os.write(_STDERR, _CTRL_C_MESSAGE)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a `StopRequest` whose event is set by SIGTERM or by the first Ctrl-C.

    Signals do not set the event outside of the main thread, or in a job with several processes, in
    which JAX handles SIGTERM. Ctrl-C does not set the event if the program has installed another
    handler for SIGINT.
    """
    request = StopRequest()
    # With several processes, a handler here would replace JAX's handler.
    is_single_process = jax.process_count() == 1
    if not is_single_process or threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {signal.SIGTERM: lambda *_: request.event.set()}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = request._on_ctrl_c
    previous = {number: signal.signal(number, it) for number, it in handlers.items()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
