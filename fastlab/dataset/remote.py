"""Files behind a URL, by fsspec: ``s3://``, ``gs://``, ``hf://``, ``https://`` and others.

What fails is tried again, with growing pauses: servers throttle, and connections break. Nothing
here may be used in a forked process, where fsspec's thread no longer runs.
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastlab.console import UserError, first_line, printable
from fastlab.machine import installing

_TRIES = 6
_PAUSE = 0.2  # seconds before the second try; each further pause is twice as long
# What another try does not change.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError")  # of botocore and google.auth
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on this machine
_NOISY = ("fsspec", "s3fs", "gcsfs", "huggingface_hub")

_Result = TypeVar("_Result")


class FetchStopped(Exception):
    """A file is no longer wanted."""


class RemoteFile(NamedTuple):
    size: int | None
    """Bytes; None where the server does not say."""
    version: str
    """ETag or time of the last change; empty where the server gives neither."""


def is_remote(place: str | Path) -> bool:
    """Whether `place` is a URL rather than a path on this machine."""
    return "://" in str(place)


class Remote:
    """A file or folder behind a URL. All methods raise `UserError` where it cannot be read after
    several tries."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` for an unknown scheme, and where its package is missing."""
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._fs, self._root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{url}: {first_line(error)}; {installing('remote')}") from None
        except ValueError as error:
            raise UserError(f"{url}: cannot be opened ({first_line(error)})") from None
        for name in _NOISY:  # what fails becomes one line, not a traceback for each try
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._fs.retries = 1  # of s3fs itself
        # gcsfs always tries six times, which takes half a minute.
        self._tries = 2 if self.url.startswith(("gs:", "gcs:")) else _TRIES

    def files(self) -> dict[str, RemoteFile]:
        """Every file below the folder by its relative path, sorted; "" for the URL of a file."""
        found: dict[str, dict[str, Any]] = self._retried("", self._list)
        if not found:
            raise UserError(f"{self.url}: no such file or folder, or an empty one")
        return {
            path.removeprefix(self._root).strip("/"): RemoteFile(info.get("size"), _version(info))
            for path, info in sorted(found.items())
            if info.get("type") != "directory"
        }

    def _list(self) -> dict[str, dict[str, Any]]:
        self._fs.invalidate_cache()
        info = self._fs.info(self._root)
        if info["type"] == "file":  # on a web server, `find` would read it in search of links
            return {self._root: info}
        return self._fs.find(self._root, detail=True)

    def read(self, path: str) -> bytes:
        """The bytes of the file at the relative `path`."""
        return self._retried(path, lambda: self._fs.cat_file(self._join(path)))

    def fetch(
        self,
        path: str,
        target: Path,
        size: int | None = None,
        arrived: Callable[[int], object] = int,
    ) -> None:
        """Copy the file at the relative `path` to `target`, under another name until it is whole.

        `size`, bytes, is what it must have; another try follows where it has not. `arrived` is
        called with the number of bytes of each part, and may end the copy by a `UserError` or
        `FetchStopped`. Raises OSError where there is no room for the file.
        """
        from fsspec.callbacks import Callback

        callback = Callback()
        callback.relative_update = arrived
        partial = target.with_name(f".{target.name}.partial")

        def copy() -> None:
            self._fs.get_file(self._join(path), str(partial), callback=callback)
            if size is not None and (got := partial.stat().st_size) != size:
                raise OSError(f"{got} of {size} bytes arrived")

        try:
            self._retried(path, copy)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _join(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _retried(self, path: str, job: Callable[[], _Result]) -> _Result:
        where = printable(f"{self.url}/{path}".rstrip("/"))
        for number in range(self._tries):
            if number:  # at random, so that the processes of a cluster do not return all at once
                time.sleep(_PAUSE * 2 ** (number - 1) * random.uniform(0.5, 1.5))
            try:
                return job()
            except (UserError, FetchStopped):
                raise
            except Exception as error:  # each client has errors of its own, some no OSError
                if getattr(error, "errno", None) in _NO_ROOM:
                    raise
                if self.url.startswith("http"):  # fsspec calls every failure a missing file there
                    error = error.__cause__ or error
                problem = _reason(error)
                if _is_lasting(error):
                    raise UserError(f"{where}: cannot be read ({problem})") from None
        raise UserError(f"{where}: cannot be read in {self._tries} tries ({problem})")


def _version(info: dict[str, Any]) -> str:
    keys = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
    return next((str(info[key]).strip('"') for key in keys if info.get(key)), "")


def _is_lasting(error: BaseException) -> bool:
    status = getattr(error, "status", 0)  # of an HTTP response
    refused = 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, _LASTING) or type(error).__name__ in _NO_CREDENTIALS


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return f"no permission: {first_line(error)}; check the credentials"
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"no credentials: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)}"
