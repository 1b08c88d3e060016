"""Fetch a dataset archive over HTTP: resumed after a cut, verified before it gets its name."""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import struct
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from fastlab import __version__
from fastlab.console import UserError


@dataclass(frozen=True)
class Archive:
    """A published file: its address, checksum ("md5:HEX" or "sha256:HEX"), and size in bytes."""

    url: str
    checksum: str
    size: int


# MD5, because that is the sum widely published for this file; no SHA-256 of it is known to us with
# certainty. It guards against damage and mix-ups, not against an attacker who made both files.
TINY_IMAGENET = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    checksum="md5:90528d7ca1a48142e341f4ef8d21d0de",
    size=248_100_043,
)

_CHUNK = 1 << 18
_LONGEST_DELAY = 30.0
_HEX_DIGITS = {"md5": 32, "sha256": 64}
_PASSING_STATUS = {408, 429}


def download(
    out: Path | str,
    url: str = TINY_IMAGENET.url,
    sha256: str | None = None,
    size: int | None = None,
    progress: bool | None = None,
    *,
    force: bool = False,
    timeout: float = 30.0,
    attempts: int = 5,
    delay: float = 1.0,
) -> Path:
    """Fetch `url` to `out`, verify it, print one line about it, and return the file's path.

    Partial data stays beside the target as `<name>.part` (with `<name>.part.json`) after a failure
    or Ctrl-C, and the next call goes on from there unless the remote file has changed. A target
    that is already right is kept, and nothing is downloaded.

    Args:
        out: a file; or an existing directory, or a string ending in "/", for the URL's file name
            in that directory. Missing directories are made.
        url: http or https.
        sha256: expected checksum, as 64 hex digits or tagged: "sha256:HEX", "md5:HEX". None means
            the published one for the default URL, and for any other URL no checksum: only the size
            that the server states is compared, and a .zip must have a readable directory.
        size: expected size in bytes, if known.
        progress: True shows a bar on stderr, False none, None one if stderr is a terminal.
        force: replace an existing target that differs.
        timeout: seconds without a byte before a connection counts as dead.
        attempts: failed requests in a row, none of which got further, before giving up.
        delay: seconds before the first retry; doubles with each further one, to at most 30.

    Raises:
        UserError: bad URL or checksum, the target exists and differs, the server refuses or can't
            be reached, the file can't be written, or what arrived fails verification (it is then
            removed).
    """
    _check_url(url)
    if sha256 is None and url == TINY_IMAGENET.url:
        sha256, size = TINY_IMAGENET.checksum, TINY_IMAGENET.size
    checksum = None if sha256 is None else _Checksum.parse(sha256)
    job = _Job(url, _target(out, url), checksum, size, timeout)
    try:
        _fetch(job, _Patience(attempts, delay), progress, force)
    except OSError as error:
        raise UserError(f"{error.filename or job.part}: {error.strerror or error}") from error
    return job.target


class _TransientError(Exception):
    """A failure that may pass: worth another request."""


@dataclass(frozen=True)
class _Checksum:
    algorithm: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> "_Checksum":
        algorithm, _, digest = text.strip().lower().rpartition(":")
        algorithm = algorithm or "sha256"
        digits = _HEX_DIGITS.get(algorithm)
        if digits is None:
            raise UserError(f"checksum {text!r}: algorithm must be one of {', '.join(_HEX_DIGITS)}")
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", digest):
            raise UserError(f"checksum {text!r}: {algorithm} takes {digits} hex digits")
        return cls(algorithm, digest)

    def of(self, path: Path) -> "_Checksum":
        """The same algorithm's checksum of a file."""
        with path.open("rb") as file:
            new = hashlib.new(self.algorithm, usedforsecurity=False)
            return _Checksum(self.algorithm, hashlib.file_digest(file, lambda: new).hexdigest())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digest}"


@dataclass(frozen=True)
class _Job:
    url: str
    target: Path
    checksum: _Checksum | None
    size: int | None
    timeout: float

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def sidecar(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    @property
    def is_zip(self) -> bool:
        names = (self.target.name, urlsplit(self.url).path)
        return any(name.lower().endswith(".zip") for name in names)

    def discard(self) -> None:
        self.sidecar.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Remote:
    """The version of the remote file that a partial file belongs to; stored in the sidecar."""

    url: str
    etag: str | None
    modified: str | None
    size: int | None

    @classmethod
    def stated(cls, url: str, headers: Mapping[str, str]) -> "_Remote":
        length = headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        return cls(url, headers.get("ETag"), headers.get("Last-Modified"), size)

    @classmethod
    def load(cls, path: Path) -> "_Remote | None":
        try:
            return cls(**json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def validator(self) -> str | None:
        """The value for If-Range, where HTTP forbids weak entity tags."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.modified

    def agrees(self, headers: Mapping[str, str], total: int | None) -> bool:
        """Whether an answer is about this version, as far as it says."""
        pairs = (
            (self.etag, headers.get("ETag")),
            (self.modified, headers.get("Last-Modified")),
            (self.size, total),
        )
        return all(None in pair or pair[0] == pair[1] for pair in pairs)


@dataclass
class _Patience:
    """Counts failures since the transfer last got further than ever before."""

    attempts: int
    delay: float
    furthest: int = 0
    failures: int = 0

    def spend(self, error: _TransientError, reached: int) -> None:
        """Wait before the next attempt, or give up. `reached`: bytes now on disk."""
        # Against the furthest point, not the last one: a server that ignores Range and always cuts
        # would otherwise "progress" from zero for ever.
        if reached > self.furthest:
            self.furthest, self.failures = reached, 0
        self.failures += 1
        if self.failures >= self.attempts:
            raise UserError(f"{error}; gave up after {self.failures} attempts") from error
        wait = min(self.delay * 2 ** (self.failures - 1), _LONGEST_DELAY)
        tqdm.write(f"{error}; next attempt in {wait:g} s", file=sys.stderr)
        time.sleep(wait)


class _Answers(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and hands back a 416 as a response: its Content-Range tells the size."""

    def http_error_302(
        self,
        req: urllib.request.Request,
        fp: http.client.HTTPResponse,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> http.client.HTTPResponse | None:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:  # an address it can't parse: urllib then leaves the socket open
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def http_error_416(
        self,
        req: urllib.request.Request,
        fp: http.client.HTTPResponse,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> http.client.HTTPResponse:
        return fp


def _opener() -> urllib.request.OpenerDirector:
    # Not build_opener: that would follow a redirect to ftp.
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        _Answers,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
    )
    for handler in handlers:
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", f"fastlab/{__version__}")]
    return opener


def _check_url(url: str) -> None:
    if not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"URL {url!r}: percent-encode spaces, control and non-ASCII characters")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UserError(f"URL {url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"URL {url!r}: must begin with http://HOST or https://HOST")
    if parts.username is not None:
        raise UserError(f"URL for {parts.hostname}: user names and passwords are not supported")


def _target(out: Path | str, url: str) -> Path:
    text = os.fspath(out)
    if not text.endswith(("/", os.sep)) and not Path(text).is_dir():
        return Path(text)
    # Split after unquoting too: "%2F" and a backslash must not reach outside the directory.
    last = PurePosixPath(unquote(urlsplit(url).path).replace("\\", "/")).name
    name = re.sub(r"[^\w.+-]", "_", last).lstrip(".")
    if not name:
        raise UserError(f"URL {url!r}: ends in no file name; give OUT as a file")
    return Path(text) / name


def _fetch(job: _Job, patience: _Patience, progress: bool | None, force: bool) -> None:
    opener = _opener()
    if _is_present(job, opener, patience, force):
        return
    job.target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(job):
        _transfer(job, opener, patience, progress)
        verdict = _verify(job)
        _install(job, force)
    print(f"{job.target}: {job.target.stat().st_size} bytes, {verdict}")


@contextlib.contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """Two writers of one .part would mix what they write. A killed one holds no lock."""
    path = job.target.with_name(job.target.name + ".part.lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # locked, or removed by its owner since it was opened
            raise UserError(f"{job.target}: another download is writing it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_present(
    job: _Job, opener: urllib.request.OpenerDirector, patience: _Patience, force: bool
) -> bool:
    """Whether the target is already right; prints so. An existing other file is an error."""
    if not job.target.exists():
        return False
    if not job.target.is_file():
        raise UserError(f"{job.target}: exists and is not a file; choose another OUT")
    if job.checksum:
        found, wanted = str(job.checksum.of(job.target)), str(job.checksum)
        basis = f"{job.checksum.algorithm} verified"
    elif force:
        return False
    else:
        remote = _remote_size(job, opener, patience)
        found, wanted = f"{_size_of(job.target)} bytes", f"{remote} bytes"
        basis = "of the size that the server states, no checksum verified"
    if found == wanted:
        print(f"{job.target}: already there, {basis}; nothing downloaded")
    elif not force:
        raise UserError(f"{job.target}: exists and is {found}, expected {wanted}; move it away")
    return found == wanted


def _remote_size(job: _Job, opener: urllib.request.OpenerDirector, patience: _Patience) -> int:
    while True:
        try:
            with _request(job, opener, {}, method="HEAD") as response:
                size = _Remote.stated(job.url, response.headers).size
            if size is None:
                raise UserError(f"{job.url}: the server states no size")
            return size
        except _TransientError as error:
            patience.spend(error, reached=0)
        except UserError as error:
            raise UserError(f"{job.target}: exists, and can't be compared: {error}") from error


def _transfer(
    job: _Job, opener: urllib.request.OpenerDirector, patience: _Patience, progress: bool | None
) -> None:
    """Bring the whole file into the .part, over as many requests as patience allows."""
    # tqdm's own None: disabled unless its file is a terminal.
    disable = None if progress is None else not progress
    with tqdm(
        desc=job.target.name, unit="B", unit_scale=True, file=sys.stderr, disable=disable
    ) as bar:
        while True:
            try:
                return _attempt(job, opener, bar)
            except _TransientError as error:
                patience.spend(error, reached=_size_of(job.part))


def _attempt(job: _Job, opener: urllib.request.OpenerDirector, bar: tqdm) -> None:
    """Make one request. Returns with the .part complete, or raises with it as far as it got."""
    remote = _resumable(job)
    offset = _size_of(job.part) if remote else 0
    headers = {"Range": f"bytes={offset}-", "If-Range": remote.validator} if remote else {}
    with _request(job, opener, headers) as response:
        if response.status == 416 and remote and _is_complete(remote, offset, response.headers):
            return
        if response.status == 200:
            remote, offset = _Remote.stated(job.url, response.headers), 0
            _check_size(job, remote.size)
            _begin(job, remote)
        elif response.status != 206 or not _continues(remote, offset, response.headers):
            if response.status in (206, 416):
                job.discard()
            raise _TransientError(f"{job.url}: HTTP {response.status} is no answer to the request")
        total = remote.size if remote.size is not None else job.size
        with job.part.open("r+b") as file:
            file.seek(offset)
            _receive(job, response, file, total, bar)


def _resumable(job: _Job) -> _Remote | None:
    """What the .part belongs to, if there is a .part and a way to ask for the rest of that."""
    remote = _Remote.load(job.sidecar)
    if remote is None or remote.url != job.url or not remote.validator:
        return None
    # Without the total, a cut of the resumed body would pass for its end.
    return remote if remote.size is not None and _size_of(job.part) else None


def _begin(job: _Job, remote: _Remote) -> None:
    # In this order, so that no crash leaves old bytes under a new version's sidecar.
    job.sidecar.unlink(missing_ok=True)
    job.part.open("wb").close()
    remote.save(job.sidecar)


def _receive(
    job: _Job, response: http.client.HTTPResponse, file: BinaryIO, total: int | None, bar: tqdm
) -> None:
    bar.reset(total)
    bar.initial = bar.n = file.tell()
    while chunk := _read(job, response):
        file.write(chunk)
        bar.update(len(chunk))
    if total is not None and file.tell() != total:
        raise _TransientError(f"{job.url}: connection cut at {file.tell()} of {total} bytes")


def _read(job: _Job, response: http.client.HTTPResponse) -> bytes:
    with _network_errors(job.url):
        # read1, not read: a stall must not take the bytes that came before it.
        return response.read1(_CHUNK)


def _request(
    job: _Job,
    opener: urllib.request.OpenerDirector,
    headers: Mapping[str, str],
    method: str = "GET",
) -> http.client.HTTPResponse:
    request = urllib.request.Request(job.url, headers=dict(headers), method=method)
    with _network_errors(job.url):
        return opener.open(request, timeout=job.timeout)


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Sort network failures into passing and final, apart from the disk's OSErrors."""
    try:
        yield
    except HTTPError as error:
        error.close()
        passing = error.code in _PASSING_STATUS or error.code >= 500
        kind = _TransientError if passing else UserError
        reason = " ".join(str(error.reason).split())
        raise kind(f"{url}: HTTP {error.code} {reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        kind = UserError if _is_final(reason) else _TransientError
        raise kind(f"{url}: {getattr(reason, 'strerror', None) or reason}") from error


def _is_final(reason: object) -> bool:
    if isinstance(reason, socket.gaierror):
        return reason.errno != socket.EAI_AGAIN
    # A string is urllib's own refusal, such as a redirect to an unknown scheme; a ValueError, its
    # failure to parse an address.
    refusals = str | ValueError | ssl.SSLCertVerificationError | http.client.InvalidURL
    return isinstance(reason, refusals)


def _is_complete(remote: _Remote, offset: int, headers: Mapping[str, str]) -> bool:
    match = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
    return bool(match) and int(match[1]) == offset and remote.agrees(headers, int(match[1]))


def _continues(remote: _Remote | None, offset: int, headers: Mapping[str, str]) -> bool:
    """Whether a 206 answer starts where the .part ends, in the same version of the file."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if remote is None or match is None or int(match[1]) != offset:
        return False
    return remote.agrees(headers, None if match[2] == "*" else int(match[2]))


def _check_size(job: _Job, offered: int | None) -> None:
    if None not in (job.size, offered) and job.size != offered:
        raise UserError(f"{job.url}: server offers {offered} bytes, expected {job.size}")


def _verify(job: _Job) -> str:
    """Check the .part and say how; wrong bytes are removed, for no resume could mend them."""
    size = _size_of(job.part)
    if job.size not in (None, size):
        job.discard()
        raise UserError(f"{job.url}: size is {size} bytes, expected {job.size}; removed")
    if job.checksum:
        found = job.checksum.of(job.part)
        if found != job.checksum:
            job.discard()
            raise UserError(f"{job.url}: checksum is {found}, expected {job.checksum}; removed")
        return f"{job.checksum.algorithm} verified"
    remote = _Remote.load(job.sidecar)
    stated = "size as stated" if remote and remote.size is not None else "no size stated"
    if not job.is_zip:
        return f"no checksum verified ({stated} by the server)"
    _check_zip(job)
    return f"no checksum verified ({stated} by the server, zip directory readable)"


def _check_zip(job: _Job) -> None:
    try:
        zipfile.ZipFile(job.part).close()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        job.discard()
        raise UserError(f"{job.url}: not a whole zip file ({error}); removed") from error


def _install(job: _Job, force: bool) -> None:
    if job.target.exists() and not force:
        raise UserError(f"{job.target}: appeared during the download; move it away and run again")
    with job.part.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(job.part, job.target)
    job.sidecar.unlink(missing_ok=True)
    _sync_directory(job.target.parent)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
