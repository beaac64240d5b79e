"""Ctrl-C and SIGTERM: the first asks a run to save and stop, the second ends it at once."""

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class RunStoppedError(Exception):
    """A run that was asked to stop, and has saved what it takes to go on.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number

    def of_sweep(self, out: Path) -> "RunStoppedError":
        """The same of a run that is one of a sweep, whose directory is given."""
        return RunStoppedError(f"{self}\nor, with the whole sweep: knife-jax train --resume --out {out}", self.signal)


class Interruptions:
    """Notes signals while it is entered.

    Python's own handlers wait for compiled code to return; a thread that is woken at once answers the first signal and obeys the second.
    Outside of the main thread, where Python has no signals, it notes nothing.

    Attributes:
        signal: the number of the first signal, None before it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[Any, Any] = {}

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():
            self._ours, self._pythons = socket.socketpair()
            self._pythons.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._pythons.fileno(), warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
            threading.Thread(target=self._answer, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._pythons.close()

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.signal = self.signal or number

    def _answer(self) -> None:
        asked = False
        while numbers := self._ours.recv(16):
            for number in (number for number in numbers if number in _SIGNALS):
                if asked:
                    print(_SHOW_CURSOR if sys.stdout.isatty() else "", end="", flush=True)
                    os._exit(128 + number)
                asked = True
                self._note(number, None)
                print("\nstopping after this chunk; once more to leave at once, with the last checkpoint", file=sys.stderr, flush=True)
        self._ours.close()
