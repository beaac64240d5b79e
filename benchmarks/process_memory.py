"""By how much a process's memory grows while something runs."""

import ctypes
import ctypes.util
import gc
from pathlib import Path

import jax

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Growth:
    """The peak of memory since it was made: of the accelerator, or of this process's resident memory (Linux only)."""

    def __init__(self) -> None:
        """Gives back what is free, and starts to watch."""
        gc.collect()
        self._on_device = _device_peak() is not None
        if not self._on_device:
            ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
            _RESET.write_text("5")  # the peak starts again from here
        self._base = 0 if self._on_device else _status("VmRSS")

    def peak(self) -> int:
        """Bytes."""
        return (_device_peak() or 0) if self._on_device else _status("VmHWM") - self._base


def _device_peak() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
