"""Work in a thread, beside local steps."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from weakref import WeakSet

import torch

EXIT_SECONDS = 10.0  # for the work that still runs when the process ends
_threads: WeakSet[threading.Thread] = WeakSet()


class Background:
    """A function that runs in a thread, on a stream of its own where there are streams.

    The thread does not keep the process alive if another worker is lost. But the end of the process waits for it for up
    to 10 seconds, since Python ends a thread that is within a collective by aborting the process.

    Args:
        work: Function that is called at once.
        device: Device of the tensors that it works on.

    Example:
        >>> results = []
        >>> Background(lambda: results.append(1), torch.device("cpu")).wait()
        >>> results
        [1]
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        _threads.add(self._thread)
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._work()
        except BaseException as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return not self._thread.is_alive() and self._error is not None

    def wait(self) -> None:
        """Return when it is done, or raise the error that it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@atexit.register
def _wait_at_exit() -> None:
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))
