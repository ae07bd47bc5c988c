"""Stopping a run between two steps: by a signal, or when its time is up."""

import contextlib
import logging
import signal
import time

from latent_codec.errors import SettingError

logger = logging.getLogger(__name__)


def check_minutes(minutes: float | None) -> None:
    """Refuse a time that is over before it begins.

    Raises:
        SettingError: if it is not above 0.
    """
    if minutes is not None and minutes <= 0:
        raise SettingError("minutes", "a number above 0", minutes)


class StopRequest:
    """`requested` after SIGINT or SIGTERM, or once `max_minutes` are over; a second Ctrl-C interrupts at once.

    A context manager: outside of it, signals do what they did before.
    """

    signal: int | None = None
    """The first signal's number."""

    def __init__(self, max_minutes: float | None):
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signalled_at: float | None = None
        self._handlers = {}

    @property
    def requested(self) -> bool:
        return self._signalled_at is not None or (
            self._deadline is not None and time.monotonic() > self._deadline
        )

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(ValueError):  # not in the main thread: signals stay as they are
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        if self._signalled_at is None:
            self._signalled_at, self.signal = time.monotonic(), number
            logger.warning("stopping after this step, with a checkpoint; Ctrl-C stops at once")
        # A launcher passes on the Ctrl-C that its processes have already seen.
        elif number == signal.SIGINT and time.monotonic() - self._signalled_at > 2:
            raise KeyboardInterrupt


def ignore_interrupts(worker: int) -> None:
    """For loader processes, which the terminal's Ctrl-C reaches too: the training process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
