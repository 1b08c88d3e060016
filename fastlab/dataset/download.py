"""Fetch a dataset archive over HTTP: resumed after a cut, verified before it gets its name.

This is not done by pooch, which deletes its temporary file when a connection is cut and starts
again from the first byte (pooch 1.9, `stream_download`); urllib can ask for the rest. Only a
checksum tells whether two halves belong together: without one, each request starts from zero.
"""

import contextlib
import hashlib
import os
import re
import ssl
import sys
import time
import zipfile
from collections.abc import Generator
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from fastlab import __version__
from fastlab.console import UserError
from fastlab.files import inherited_lock


class Archive(NamedTuple):
    """A published file: its address, checksum ("md5:HEX" or "sha256:HEX") and size in bytes."""

    url: str
    checksum: str | None = None
    size: int | None = None


# MD5, because that is the checksum published for this file; we know no SHA-256 of it with
# certainty. It guards against damage and mix-ups, not against an attacker who made both files.
TINY_IMAGENET = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    checksum="md5:90528d7ca1a48142e341f4ef8d21d0de",
    size=248_100_043,
)

_CHUNK = 1 << 18  # bytes
_TIMEOUT = 30.0  # seconds without a byte, after which a connection counts as dead
_ATTEMPTS = 5  # failures in a row that got no further, after which a transfer is given up
_DELAYS = 1.0, 30.0  # seconds between two attempts: the first, doubled each time, and the longest
# These may pass, unlike errors of the disk, so the request is repeated.
_NETWORK_ERRORS = (URLError, TimeoutError, ConnectionError, ssl.SSLError, HTTPException)


def download(
    out: Path | str, url: str = TINY_IMAGENET.url, sha256: str | None = None, *, force: bool = False
) -> Path:
    """Fetch `url` to `out`, verify it, print one line about it, and return the file's path.

    After a failure or Ctrl-C the data stays beside the target as `<name>.part`, where the next call
    with a checksum resumes. A target that has the checksum already is kept.

    `out` is a file; or a directory (an existing one, or a string that ends in "/") for the URL's
    file name. `sha256` is 64 hex digits, "sha256:HEX" or "md5:HEX"; None means the published
    checksum for the default URL, and none for any other. `force` replaces a target that differs.
    Raises `UserError` for every failure.
    """
    archive = _archive(url, sha256)
    target = _target(out, url)
    part = target.with_name(target.name + ".part")
    try:
        if not _is_present(archive, target, force):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target):
                _transfer(archive, part)
                _install(archive, part, target)
    except OSError as error:
        raise UserError(f"{error.filename or part}: {error.strerror or error}") from error
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Generator[None]:
    """Keep a second download from writing the same `.part`. The lock file is removed afterwards."""
    lock = target.with_name(target.name + ".part.lock")
    with inherited_lock(lock, f"{target}: another download is writing it"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _archive(url: str, checksum: str | None) -> Archive:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.username is not None or not re.fullmatch("[!-~]+", url):
        raise UserError(  # without the URL, which may hold a password
            "URL: expected http://HOST/PATH or https://HOST/PATH, percent-encoded, no user name"
        )
    if checksum is None:
        return TINY_IMAGENET if url == TINY_IMAGENET.url else Archive(url)
    tagged = checksum.strip().lower()
    tagged = tagged if ":" in tagged else f"sha256:{tagged}"
    if not re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", tagged):
        raise UserError(f"checksum {checksum!r}: expected 64 hex digits, sha256:HEX or md5:HEX")
    return Archive(url, tagged)


def _target(out: Path | str, url: str) -> Path:
    text = os.fspath(out)
    if not text.endswith("/") and not Path(text).is_dir():
        return Path(text)
    # Split after unquoting too: "%2F" and a backslash must not reach outside the directory.
    last = PurePosixPath(unquote(urlsplit(url).path).replace("\\", "/")).name
    name = re.sub(r"[^\w.+-]", "_", last).lstrip(".")
    if not name:
        raise UserError(f"URL {url!r}: ends in no file name; give OUT as a file")
    return Path(text) / name


def _is_present(archive: Archive, target: Path, force: bool) -> bool:
    """Whether the target is right already. Raises `UserError` for another, unless `force`."""
    if not target.exists():
        return False
    if not target.is_file():
        raise UserError(f"{target}: exists and is not a file; choose another OUT")
    problem = _problem(archive, target) if archive.checksum else "no --sha256 tells if it is right"
    if problem and not force:
        raise UserError(f"{target}: exists, and {problem}; replace it with --force")
    if not problem:
        print(f"{target}: already there, checksum verified; nothing downloaded")
    return not problem


def _problem(archive: Archive, path: Path) -> str:
    """What is wrong with the file at `path`; empty if it is right as far as that can be checked."""
    if not archive.checksum:
        is_broken = ".zip" in path.suffixes and not zipfile.is_zipfile(path)
        return "it is not a whole zip file" if is_broken else ""
    algorithm = archive.checksum.partition(":")[0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    actual = f"{algorithm}:{digest.hexdigest()}"
    is_right = actual == archive.checksum
    return "" if is_right else f"its checksum is {actual}, expected {archive.checksum}"


def _transfer(archive: Archive, part: Path) -> None:
    """Bring the whole file into `part`, over as many requests as it takes."""
    furthest = failures = 0
    with tqdm(desc=part.stem, unit="B", unit_scale=True, disable=None) as bar:
        while True:
            try:
                return _request(archive, part, bar)
            except _NETWORK_ERRORS as error:
                problem = f"{archive.url}: {_reason(error)}"
                # Progress counts from the furthest point: otherwise a server that ignores Range and
                # always cuts would make progress from zero for ever.
                failures = 1 if _size(part) > furthest else failures + 1
                furthest = max(furthest, _size(part))
                if failures >= _ATTEMPTS:
                    hint = f"gave up after {failures} attempts; the same command tries again"
                    raise UserError(f"{problem}; {hint}") from error
                wait = min(_DELAYS[0] * 2 ** (failures - 1), _DELAYS[1])
                tqdm.write(f"{problem}; next attempt in {wait:g} s", file=sys.stderr)
                time.sleep(wait)


def _reason(error: Exception) -> str:
    """Why a request failed, in one line."""
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {' '.join(error.reason.split())}"
    reason = getattr(error, "reason", error)
    return getattr(reason, "strerror", None) or str(reason)


def _request(archive: Archive, part: Path, bar: tqdm) -> None:
    """Append to `part` what it lacks. Raises one of `_NETWORK_ERRORS` if it stays incomplete."""
    offset = _size(part) if archive.checksum else 0
    headers = {"User-Agent": f"fastlab/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with _open(Request(archive.url, headers=headers)) as response:
        content_range = response.headers.get("Content-Range", "")
        if response.status == 416 and content_range == f"bytes */{offset}":
            return  # there is nothing left to get
        if response.status == 200:
            offset = 0
        elif response.status != 206 or not content_range.startswith(f"bytes {offset}-"):
            part.unlink(missing_ok=True)
            raise ConnectionError(f"HTTP {response.status} is no answer to the request")
        length = response.headers.get("Content-Length", "")
        size = offset + int(length) if length.isdecimal() else archive.size
        if archive.size not in (None, size):
            expected = f"{archive.size} bytes were expected"
            raise UserError(f"{archive.url}: offers {size} bytes, {expected}; give another --url")
        _receive(response, part, offset, size, bar)


def _open(request: Request) -> HTTPResponse | HTTPError:
    """Return the response, also a 416 (nothing lies in the range). Raises `UserError` for a status
    that is final, and `HTTPError` for one that may pass."""
    try:
        return urlopen(request, timeout=_TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        if error.code >= 500 or error.code in (408, 429):
            raise
        problem = f"{request.full_url}: {_reason(error)}"
        raise UserError(f"{problem}; check the address") from error


def _receive(
    response: HTTPResponse | HTTPError, part: Path, offset: int, size: int | None, bar: tqdm
) -> None:
    with part.open("ab" if offset else "wb") as file:
        bar.reset(size)
        bar.initial = bar.n = offset
        while chunk := response.read1(_CHUNK):  # not read: a stall must not take the bytes before
            file.write(chunk)
            bar.update(len(chunk))
        if size is not None and file.tell() != size:
            raise ConnectionError(f"connection cut at {file.tell()} of {size} bytes")


def _install(archive: Archive, part: Path, target: Path) -> None:
    """Give `part` its name if it is right, and remove it if not: no resumption could correct it."""
    problem = _problem(archive, part)
    if problem:
        part.unlink()
        raise UserError(f"{archive.url}: {problem}; removed; check the address, and try again")
    os.replace(part, target)
    verdict = "checksum verified" if archive.checksum else "no checksum verified"
    print(f"{target}: {_size(target)} bytes, {verdict}")


def _size(path: Path) -> int:
    """Size in bytes; 0 where there is no file."""
    return path.stat().st_size if path.exists() else 0
