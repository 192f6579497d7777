"""SIGINT and SIGTERM wait for the end of a step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Patience:
    """A context in which SIGINT and SIGTERM are noted; a second one has its usual effect at once.

    Only the main thread may say what a signal does; in another one everything is as usual.

    Attributes:
        asked: whether one came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}
        self._came: tuple[int, FrameType | None] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self.answer()
        self.asked, self._came = True, (number, frame)

    def answer(self) -> None:
        """Let the signal that came have the effect that it had before this context: it may not come back."""
        self._restore()
        number, frame = self._came or (signal.SIGINT, None)
        handler = signal.getsignal(number)
        if callable(handler):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.raise_signal(number)
        raise KeyboardInterrupt

    def __enter__(self) -> "Patience":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
