"""Writing past the page cache: memory that is not there to be filled costs no time to fill."""

import errno
import fcntl
import os
import time
from pathlib import Path

import numpy as np

ALIGNMENT = 4096  # bytes, of memory, offset and length; what every file system is content with
_TRIAL = 16 << 20  # bytes, before the disk is judged
_ENOUGH = 500 << 20  # bytes/s; a slower disk would keep the workers waiting


class DirectFile:
    """A new file, written front to back with ``O_DIRECT`` where file system and disk are up to it.

    What is not aligned, and everything after it, goes through the page cache. So does everything
    once a slow disk has made the writer wait: the page cache would have let it go on.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.size = 0
        """Bytes."""
        self._direct = self._set_direct(True)
        self._seconds = 0.0

    def write(self, data: memoryview) -> None:
        """All of `data`, of bytes. Raises OSError."""
        while data:
            if self._direct and not (_aligned(data) and self._keeps_up()):
                self._direct = self._set_direct(False)
            started = time.perf_counter()
            written = self._write_some(data)
            self._seconds += time.perf_counter() - started
            self.size += written
            data = data[written:]

    def close(self) -> None:
        os.close(self._file)

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._file, data)
        except OSError as error:
            if not (self._direct and error.errno == errno.EINVAL):
                raise
        self._direct = self._set_direct(False)  # a file system with more to ask for
        return os.write(self._file, data)

    def _keeps_up(self) -> bool:
        return self.size < _TRIAL or self.size > self._seconds * _ENOUGH

    def _set_direct(self, wanted: bool) -> bool:
        """Whether the file now is direct."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags)
        except OSError:
            return False
        return wanted


def _aligned(data: memoryview) -> bool:
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    return len(data) % ALIGNMENT == 0 and address % ALIGNMENT == 0
