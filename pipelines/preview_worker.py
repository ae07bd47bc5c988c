"""A thread that shows the newest of what it is handed, and makes nobody wait."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, get_ident

Job = Callable[[], None]


class PreviewWorker:
    """Runs jobs on one thread, in the order of their arrival.

    A frame that was not begun when the next one comes is dropped: the thread lags by one frame at most, and the last
    one is always shown. Python waits for the thread before it exits. Jobs must not raise.
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="latent-preview")
        self._lock = Lock()
        self._jobs: deque[tuple[Job, bool]] = deque()  # and whether it is a frame
        self._is_busy = False
        self._thread: int | None = None

    def show(self, frame: Job) -> None:
        """Run `frame`, unless a newer one comes before there is time to."""
        self._add(frame, is_frame=True)

    def run(self, job: Job) -> None:
        """Run `job` in any case, once all frames before it are shown or dropped."""
        self._add(job, is_frame=False)

    def wait(self) -> None:
        """Return once all earlier jobs are done.

        Raises:
            RuntimeError: in a job, which would wait for itself.
        """
        if get_ident() == self._thread:
            raise RuntimeError("a sink or previewer waits for the thread that it runs on; wait outside of it")
        self._executor.submit(lambda: None).result()

    def _add(self, job: Job, is_frame: bool) -> None:
        with self._lock:
            if is_frame and self._jobs and self._jobs[-1][1]:
                self._jobs.pop()
            self._jobs.append((job, is_frame))
            if self._is_busy:
                return
            self._is_busy = True
        self._executor.submit(self._work)

    def _work(self) -> None:
        self._thread = get_ident()
        while True:
            with self._lock:
                if not self._jobs:
                    self._is_busy = False
                    return
                job, _ = self._jobs.popleft()
            job()
            del job  # or its tensors would stay until the next one
