"""Work in a thread, beside local steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Background:
    """A function that runs in a thread, on a stream of its own where there are streams.

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
        self._thread = threading.Thread(target=self._run, daemon=True)  # a lost worker must not keep this one alive
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._work()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Return when it is done, or raise the error that it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
