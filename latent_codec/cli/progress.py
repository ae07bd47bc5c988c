"""Show on stderr what a verb is doing.

    with showing("encoding") as report:
        encode_source(..., on_progress=report)            # calls report(done, total) or report(done, total, phase)
    for path in progress(paths, "decoding"): ...

On a terminal this is a bar. Elsewhere (a log, a pipe) it is one line after 2 s and one every 10 s, whether or not the
work reports, so that a long step is seen as well. Parts inside a part are shown after it.
"""

import gc
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

BAR_AFTER = 0.5
"""Seconds until a terminal gets a bar: what is done sooner needs none."""
FIRST_LINE_AFTER = 2.0
"""Seconds until the first line, and until that of a new phase of the same part."""
LINE_EVERY = 10.0
"""Seconds between lines."""
_LOOK_EVERY = 0.2


class Part:
    """One thing being done; call it to report progress."""

    def __init__(self, what: str):
        self.what, self.done, self.total = what, 0, None
        self.since = self.phase_since = time.monotonic()
        self.first_done = 0

    def __call__(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """Report that `done` of `total` are done, of the phase `what` where there are several."""
        if what not in (None, self.what):
            self.what, self.phase_since, self.first_done = what, time.monotonic(), done
            _display.phase_began()
        self.done, self.total = done, total
        _display.refresh()

    def line(self) -> str:
        """`encoding: 300 of 1000, 24 s, about 56 s left`."""
        now = time.monotonic()
        count = "" if self.total is None else f" {self.done} of {self.total},"
        made = self.done - self.first_done
        left = ""
        if self.total is not None and made > 0 and self.done < self.total:
            left = f", about {(now - self.phase_since) / made * (self.total - self.done):.0f} s left"
        return f"{self.what}:{count} {now - self.since:.0f} s{left}"


@contextmanager
def showing(what: str) -> Iterator[Part]:
    """Show `what` while the block runs; call the Part that it gives to report progress."""
    part = Part(what)
    _display.begin(part)
    try:
        yield part
    finally:
        _display.end(part)


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Show it, and leave out the garbage collector, which would walk over all that is imported: a sixth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with showing("loading libraries"):
            yield
    finally:
        if was_enabled:
            gc.enable()


def progress(items: Iterable, what: str) -> Iterator:
    """Yield the items, and show how many are done."""
    items = list(items)
    with showing(what) as report:
        for done, item in enumerate(items):
            report(done, len(items))
            yield item


class _Display:
    """The parts being done, outermost first, and the thread that shows them."""

    def __init__(self):
        self._parts: list[Part] = []
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._due = 0.0
        self._bar, self._tasks = None, {}

    def begin(self, part: Part) -> None:
        with self._lock:
            self._parts.append(part)
            if len(self._parts) > 1:
                self.phase_began()
            # Of several processes, the first shows it.
            elif sys.stderr is not None and os.environ.get("RANK", "0") == "0":
                self._due = time.monotonic() + (BAR_AFTER if _is_terminal() else FIRST_LINE_AFTER)
                self._stopped = threading.Event()
                self._thread = threading.Thread(target=self._look, args=(self._stopped,), daemon=True)
                self._thread.start()

    def end(self, part: Part) -> None:
        with self._lock:
            self._parts.remove(part)
            if self._bar is not None and part in self._tasks:
                self._bar.remove_task(self._tasks.pop(part))
            if self._parts:
                return
            self._stopped.set()
            if self._bar is not None:
                self._bar.stop()
                self._bar, self._tasks = None, {}

    def phase_began(self) -> None:
        with self._lock:
            self._due = min(self._due, time.monotonic() + FIRST_LINE_AFTER)

    def refresh(self) -> None:
        with self._lock:
            if not self._parts or self._thread is None:
                return
            if self._bar is None:
                if time.monotonic() < self._due:
                    return
                if _is_terminal():
                    self._bar = _start_bar()
                else:
                    self._due = time.monotonic() + LINE_EVERY
                    with suppress(OSError):  # nobody reads it any more
                        print("; ".join(part.line() for part in self._parts), file=sys.stderr, flush=True)
                    return
            for part in self._parts:
                if part not in self._tasks:
                    self._tasks[part] = self._bar.add_task(part.what, total=None)
                self._bar.update(
                    self._tasks[part], description=part.what, completed=part.done, total=part.total
                )

    def _look(self, stopped: threading.Event) -> None:
        while not stopped.wait(_LOOK_EVERY):
            with self._lock:
                if not stopped.is_set():
                    self.refresh()


_display = _Display()


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _start_bar():
    from rich import progress as columns
    from rich.console import Console

    bar = columns.Progress(
        columns.TextColumn("{task.description}", markup=False),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        columns.TimeElapsedColumn(),
        columns.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # else results would go to stderr
    )
    bar.start()
    return bar
