"""Fetch a dataset archive over HTTP: resumed after a cut, verified before it gets its name.

This is not done by pooch, which deletes its temporary file when a connection is cut and starts
again from the first byte (pooch 1.9, `stream_download`); urllib can ask for the rest. Only a
checksum tells whether two halves belong together: without one, each request starts from zero.
"""

import errno
import hashlib
import os
import re
import ssl
import stat
import sys
import time
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from fastlab import __version__
from fastlab.console import UserError, first_line, printable
from fastlab.files import lies_at, try_flock

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
# MD5, because that is the checksum published for this file; we know no SHA-256 of it with
# certainty. It guards against damage and mix-ups, not against an attacker who made both files.
TINY_IMAGENET_CHECKSUM = "md5:90528d7ca1a48142e341f4ef8d21d0de"

_CHUNK = 1 << 18  # bytes
_TIMEOUT = 30.0  # seconds without a byte, after which a connection counts as dead
_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)  # seconds before each further request
# These may pass, unlike errors of the disk, so the request is repeated.
_NETWORK_ERRORS = (URLError, TimeoutError, ConnectionError, ssl.SSLError, HTTPException)


def download(
    out: Path | str, url: str = TINY_IMAGENET_URL, sha256: str | None = None, *, force: bool = False
) -> Path:
    """Fetch `url` to `out`, verify it, print one line about it, and return the file's path.

    After a failure or Ctrl-C the data stays beside the target as `<name>.part`, where the next call
    with a checksum resumes. A target that has the checksum already is kept.

    `out` is a file; or a directory (an existing one, or a string that ends in "/") for the URL's
    file name. `sha256` is 64 hex digits, "sha256:HEX" or "md5:HEX"; None means the published
    checksum for the default URL, and none for any other. `force` replaces a target that differs.
    Raises `UserError` for every failure.
    """
    checksum = _checksum(url, sha256)
    target = _target(out, url)
    part = target.with_name(target.name + ".part")
    try:
        if not _is_present(target, checksum, force):
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(url, checksum, part, target)
    except OSError as error:
        raise UserError(f"{error.filename or part}: {error.strerror or error}") from error
    return target


def _checksum(url: str, given: str | None) -> str | None:
    """ "md5:HEX" or "sha256:HEX", where one is known."""
    if not re.fullmatch(r"https?://[\w-]+(\.[\w-]+)*(:\d{1,5})?(/[!-~]*)?", url, re.ASCII):
        raise UserError(  # without the URL, which may hold a password
            "URL: expected http://HOST/PATH or https://HOST/PATH, percent-encoded, no user name"
        )
    if given is None:
        return TINY_IMAGENET_CHECKSUM if url == TINY_IMAGENET_URL else None
    tagged = given.lower() if ":" in given else f"sha256:{given.lower()}"
    if not re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", tagged):
        raise UserError(f"checksum {given!r}: expected 64 hex digits, sha256:HEX or md5:HEX")
    return tagged


def _target(out: Path | str, url: str) -> Path:
    text = os.fspath(out)
    if not text.endswith("/") and not Path(text).is_dir():
        return Path(text)
    name = PurePosixPath(urlsplit(url).path).name  # still percent-encoded, so it stays one name
    if name in ("", ".."):
        raise UserError(f"URL {url!r}: ends in no file name; give OUT as a file")
    return Path(text) / name


def _is_present(target: Path, checksum: str | None, force: bool) -> bool:
    """Whether the target is right already. Raises `UserError` for another, unless `force`."""
    if not target.exists():
        return False
    problem = _problem(target, checksum) if checksum else "no --sha256 tells if it is right"
    if problem and not force:
        raise UserError(f"{target}: exists, and {problem}; replace it with --force")
    if not problem:
        print(f"{target}: already there, checksum verified; nothing downloaded")
    return not problem


def _problem(path: Path, checksum: str) -> str:
    """In which way the file at `path` does not have this checksum; empty if it has."""
    algorithm = checksum.partition(":")[0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    actual = f"{algorithm}:{digest.hexdigest()}"
    return "" if actual == checksum else f"its checksum is {actual}, expected {checksum}"


def _fetch(url: str, checksum: str | None, part: Path, target: Path) -> None:
    """Fetch into `part` and give it its name; or remove it where no resumption could correct it."""
    with open(part, "ab", opener=_no_link) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            raise UserError(f"{part}: is no file, or has another name too; remove it")
        # A file that was renamed between its opening and its locking is a finished download.
        if not (try_flock(file) and lies_at(file.fileno(), part)):
            raise UserError(f"{target}: another download is writing it")
        try:
            _transfer(url, file, verified=checksum is not None)
        except UserError:
            if not file.tell():
                part.unlink()
            raise
        file.flush()
        problem = _problem(part, checksum) if checksum else ""
        if problem:
            part.unlink()
            raise UserError(f"{url}: {problem}; removed; check the address, and try again")
        os.replace(part, target)
    verdict = "checksum verified" if checksum else "no checksum verified"
    print(f"{target}: {target.stat().st_size} bytes, {verdict}")


def _no_link(path: str, flags: int) -> int:
    """An opener that does not follow a link, whose target is not ours to write, and does not wait
    for the reader of a pipe. Raises `UserError` for a link."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path}: is a link; remove it") from None


def _transfer(url: str, file: IO[bytes], verified: bool) -> None:
    """Bring the whole file into `file`, over as many requests as it takes."""
    for delay in (*_DELAYS, None):
        try:
            return _request(url, file, verified)
        except ValueError as error:  # such as a redirection to "http://["
            raise UserError(f"{url}: invalid answer ({_brief(error)}); check the address") from None
        except _NETWORK_ERRORS as error:
            problem = f"{url}: {_brief(error)}"
            if isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{problem}; check the address") from error
            if delay is None:
                hint = f"gave up after {len(_DELAYS) + 1} attempts; the same command tries again"
                raise UserError(f"{problem}; {hint}") from error
            tqdm.write(printable(f"{problem}; next attempt in {delay:g} s"), file=sys.stderr)
            time.sleep(delay)


def _brief(error: Exception) -> str:
    """The message, which may quote the server at length."""
    return first_line(error)[:200]


class _Encrypted(HTTPRedirectHandler):
    """Follows no redirection from https to http, where others could replace the file on its way."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            fp.close()
            raise UserError(
                f"{req.full_url}: redirects to {newurl}, which is not encrypted; give --sha256 to "
                f"accept it"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _request(url: str, file: IO[bytes], verified: bool) -> None:
    """Append to `file` what it lacks; all where it will not be verified. Raises one of
    `_NETWORK_ERRORS` if it stays incomplete, and ValueError for an invalid answer."""
    opener = build_opener() if verified else build_opener(_Encrypted)
    headers = {"User-Agent": f"fastlab/{__version__}"}
    if verified and file.tell():
        headers["Range"] = f"bytes={file.tell()}-"
    try:
        response = opener.open(Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and "Range" in headers:
            return  # nothing is left to get
        raise
    with response:
        length = response.headers["Content-Length"]
        if length is not None and not re.fullmatch(r"\d{1,18}", length, re.ASCII):
            # http.client ignores it, and then takes a connection that is cut for the whole file.
            raise ValueError("a Content-Length that is no number of bytes")
        if response.status != 206:
            file.truncate(0)
        start = file.seek(0, os.SEEK_END)
        size = None if response.length is None else start + response.length
        name = printable(Path(file.name).stem)
        with tqdm(
            desc=name, total=size, initial=start, unit="B", unit_scale=True, disable=None
        ) as bar:
            while chunk := response.read1(_CHUNK):  # not read: a stall must not take what came
                file.write(chunk)
                bar.update(len(chunk))
        if size not in (None, file.tell()):
            raise ConnectionError(f"connection cut at {file.tell()} of {size} bytes")
