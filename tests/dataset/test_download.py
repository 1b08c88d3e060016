import errno
import hashlib
import io
import os
import random
import re
import resource
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

import pytest

from fastlab.console import UserError
from fastlab.dataset import download as module
from fastlab.dataset.download import download


def make_zip(seed: int, size: int = 300_000) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.bin"), random.Random(seed).randbytes(size))
    return buffer.getvalue()


ROOT = Path(__file__).parents[2]
DATA = make_zip(1)
OTHER = make_zip(2)
CUT = 100_000
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = "md5:" + hashlib.md5(DATA, usedforsecurity=False).hexdigest()


@dataclass
class Fault:
    """What one request gets instead of a correct answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of body, then the connection ends
    stall: int | None = None  # bytes of body, then silence
    reset: bool = False  # the cut is a reset, not an orderly end
    hide_length: bool = False
    reason: str | None = None
    ignore_range: bool = False


@dataclass
class Seen:
    method: str
    path: str
    range: str | None
    status: int = 0
    body: int = 0


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else Fault()
        asked = self.headers["Range"]
        self.seen = Seen(self.command, self.path, asked)
        self.server.seen.append(self.seen)
        if fault.status is not None:
            return self.send(fault.status, b"error page", fault)
        data = self.server.data
        if asked is None or fault.ignore_range:
            return self.send(200, data, fault)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if start >= len(data):
            fault.headers["Content-Range"] = f"bytes */{len(data)}"
            return self.send(416, b"", fault)
        content_range = f"bytes {start}-{len(data) - 1}/{len(data)}"
        fault.headers = {"Content-Range": content_range} | fault.headers
        self.send(206, data[start:], fault)

    def send(self, status: int, body: bytes, fault: Fault) -> None:
        self.seen.status = status
        self.send_response(status, fault.reason)
        if not fault.hide_length:
            self.send_header("Content-Length", str(len(body)))
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.end_headers()
        short = fault.cut if fault.stall is None else fault.stall
        body = body if short is None else body[:short]
        self.seen.body = len(body)
        self.wfile.write(body)
        if fault.stall is not None:
            self.server.closing.wait(30)
        if fault.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = DATA
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up early

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"{self.root}/data/set.zip"

    @property
    def served(self) -> int:
        return sum(seen.body for seen in self.seen)

    @property
    def ranges(self) -> list[str | None]:
        return [seen.range for seen in self.seen]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def fetch(
    out: Path | str,
    server: Server,
    *,
    url: str | None = None,
    sha256: str | None = SHA256,
    force: bool = False,
    timeout: float = 30.0,
    attempts: int = 5,
) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TIMEOUT", timeout)
        patch.setattr(module, "_DELAYS", (0.0,) * (attempts - 1))
        return download(out, url or server.url, sha256, force=force)


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def leave_part(target: Path, server: Server) -> None:
    """A download that ended for good after CUT bytes."""
    server.faults = [Fault(cut=CUT)]
    with pytest.raises(UserError, match="cut at 100000 of"):
        fetch(target, server, attempts=1)
    assert part_of(target).read_bytes() == DATA[:CUT]
    server.seen.clear()


def assert_only(target: Path, data: bytes = DATA) -> None:
    assert target.read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def assert_one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)


def test_the_official_archive_is_pinned() -> None:
    assert module.TINY_IMAGENET_URL == "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    assert module.TINY_IMAGENET_CHECKSUM == "md5:90528d7ca1a48142e341f4ef8d21d0de"


@pytest.mark.parametrize("checksum", [SHA256, SHA256.upper(), "sha256:" + SHA256, MD5])
def test_a_download_is_verified_and_reported(
    checksum: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = fetch(tmp_path / "x.zip", server, sha256=checksum)
    assert target == tmp_path / "x.zip"
    assert_only(target)
    assert server.ranges == [None]
    out, err = capsys.readouterr()
    assert out == f"{target}: {len(DATA)} bytes, checksum verified\n"
    assert err == ""


def test_the_default_url_brings_its_checksum(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TINY_IMAGENET_URL", server.url)
    monkeypatch.setattr(module, "TINY_IMAGENET_CHECKSUM", MD5)
    assert_only(fetch(tmp_path / "a.zip", server, sha256=None))
    server.data = DATA + b"!"
    with pytest.raises(UserError, match="checksum is"):
        fetch(tmp_path / "b.zip", server, sha256=None)
    assert_only(tmp_path / "a.zip")


def test_a_directory_takes_the_file_name_of_the_url(server: Server, tmp_path: Path) -> None:
    assert fetch(tmp_path, server) == tmp_path / "set.zip"
    assert fetch(f"{tmp_path}/new/", server) == tmp_path / "new" / "set.zip"
    assert fetch(tmp_path / "deep" / "file", server) == tmp_path / "deep" / "file"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/..%2F..%2Fevil.zip", "..%2F..%2Fevil.zip"),
        ("/a%00%0Ab%20c.zip?x=/../y", "a%00%0Ab%20c.zip"),
    ],
)
def test_the_file_name_from_the_url_stays_in_the_directory(
    path: str, name: str, server: Server, tmp_path: Path
) -> None:
    assert fetch(tmp_path, server, url=server.root + path) == tmp_path / name
    assert_only(tmp_path / name)


@pytest.mark.parametrize("path", ["", "/", "/..", "/?a=b.zip"])
def test_a_url_without_a_file_name_is_refused(path: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file name"):
        fetch(tmp_path, server, url=server.root + path)
    assert server.seen == []


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_transfer_resumes(reset: bool, server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=CUT, reset=reset), Fault(cut=CUT)]
    assert_only(fetch(tmp_path / "x.zip", server))
    if not reset:  # a reset may lose what was on its way
        assert server.ranges == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
        assert server.served == len(DATA)
    assert server.served < 2 * len(DATA)


def test_a_later_call_resumes(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    assert_only(fetch(target, server))
    assert server.ranges == [f"bytes={CUT}-"]
    assert server.served == len(DATA) - CUT


def test_a_stalled_transfer_resumes(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(stall=CUT)]
    assert_only(fetch(tmp_path / "x.zip", server, timeout=0.2))
    assert server.ranges == [None, f"bytes={CUT}-"]


def test_a_silent_server_is_given_up(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(stall=0), Fault(stall=0)]
    with pytest.raises(UserError, match=r"timed out.*; gave up after 2 attempts") as error:
        fetch(tmp_path / "x.zip", server, timeout=0.05, attempts=2)
    assert_one_line(error)


def test_getting_no_further_than_before_is_no_progress(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=CUT, ignore_range=True) for _ in range(50)]
    with pytest.raises(UserError, match="gave up after 3 attempts"):
        fetch(tmp_path / "x.zip", server, attempts=3)
    assert len(server.seen) == 3


def test_the_delay_doubles_up_to_a_limit(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.faults = [Fault(status=503) for _ in range(20)]
    with pytest.raises(UserError, match="HTTP Error 503"):
        download(tmp_path / "x.zip", server.url, SHA256)
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_a_changed_remote_leaves_nothing_to_resume(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.data = OTHER
    checksum = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(UserError, match=r"checksum is .*; removed; .*try again") as error:
        fetch(target, server, sha256=checksum)
    assert_one_line(error)
    assert list(tmp_path.iterdir()) == []
    assert_only(fetch(target, server, sha256=checksum), OTHER)
    assert server.ranges == [f"bytes={CUT}-", None]


def test_without_a_checksum_each_request_starts_from_zero(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.data = OTHER
    server.faults = [Fault(cut=CUT)]
    assert_only(fetch(target, server, sha256=None), OTHER)
    assert server.ranges == [None, None]


def test_a_server_that_ignores_range_starts_again(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.faults = [Fault(ignore_range=True)]
    assert_only(fetch(target, server))
    assert server.ranges == [f"bytes={CUT}-"]
    assert server.served == len(DATA)


def test_a_complete_part_is_only_verified(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    part_of(target).write_bytes(DATA)
    assert_only(fetch(target, server))
    assert [seen.status for seen in server.seen] == [416]
    assert server.served == 0


def test_a_part_longer_than_the_remote_is_removed(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    part_of(target).write_bytes(DATA + b"!")
    with pytest.raises(UserError, match=r"checksum is .*; removed"):
        fetch(target, server)
    assert_only(fetch(target, server))
    assert [seen.status for seen in server.seen] == [416, 200]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_status_is_retried(status: int, server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(status=status), Fault(status=status)]
    assert_only(fetch(tmp_path / "x.zip", server))
    assert [seen.status for seen in server.seen] == [status, status, 200]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 304])
def test_a_final_status_is_not_retried(status: int, server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(status=status)]
    with pytest.raises(UserError, match=f"HTTP Error {status}") as error:
        fetch(tmp_path / "x.zip", server)
    assert_one_line(error)
    assert len(server.seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_final_status_keeps_the_part(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.faults = [Fault(status=404)]
    with pytest.raises(UserError, match="HTTP Error 404"):
        fetch(target, server)
    assert part_of(target).read_bytes() == DATA[:CUT]


def redirect(location: str) -> Fault:
    return Fault(status=302, headers={"Location": location})


def test_redirects_are_followed_with_the_range(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.faults = [redirect("/elsewhere")]
    assert_only(fetch(target, server))
    assert [seen.path for seen in server.seen] == ["/data/set.zip", "/elsewhere"]
    assert server.ranges == [f"bytes={CUT}-"] * 2


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://127.0.0.1/x"])
def test_a_redirect_to_another_scheme_is_refused(
    location: str, server: Server, tmp_path: Path
) -> None:
    server.faults = [redirect(location)]
    with pytest.raises(UserError) as error:
        fetch(tmp_path / "x.zip", server)
    assert_one_line(error)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "location", ["http://[bad/x", f"http://{'a' * 100}.com/x", "http://\xff\xfe/x"]
)
def test_a_redirect_to_no_address_is_refused_in_one_line(
    location: str, server: Server, tmp_path: Path
) -> None:
    """In another process: urllib leaves the connection open there, of which Python warns here."""
    server.faults = [redirect(location)]
    command = [sys.executable, "-m", "fastlab", "download", str(tmp_path / "x.zip")]
    done = subprocess.run(
        [*command, "--url", server.url], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "invalid answer" in done.stderr
    assert len(server.seen) == 1


@pytest.fixture
def https(server: Server, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with a certificate that the client trusts."""
    if not shutil.which("openssl"):
        pytest.skip("needs the command openssl for a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext"
    files = ["subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        thread = threading.Thread(target=secure.serve_forever, args=(0.005,))
        thread.start()
        yield secure
        secure.shutdown()
        thread.join()


def test_without_a_checksum_https_is_not_left_for_http(
    https: Server, server: Server, tmp_path: Path
) -> None:
    https.faults = [redirect(server.url)]
    url = https.url.replace("http:", "https:")
    with pytest.raises(UserError, match=r"redirects to http:.* is not encrypted") as error:
        fetch(tmp_path / "x.zip", server, url=url, sha256=None)
    assert_one_line(error)
    assert len(https.seen) == 1 and not server.seen
    assert list(tmp_path.iterdir()) == []


def test_with_a_checksum_https_may_be_left_for_http(
    https: Server, server: Server, tmp_path: Path
) -> None:
    https.faults = [redirect(server.url)]
    assert_only(fetch(tmp_path / "x.zip", server, url=https.url.replace("http:", "https:")))


def test_https_may_be_redirected_to_https(https: Server, server: Server, tmp_path: Path) -> None:
    https.faults = [redirect("/elsewhere")]
    url = https.url.replace("http:", "https:")
    assert_only(fetch(tmp_path / "x.zip", server, url=url, sha256=None))


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 4000, "-5", "1e3", ""])
@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_content_length_that_is_no_number_of_bytes_is_refused(
    length: str, sha256: str | None, server: Server, tmp_path: Path
) -> None:
    server.faults = [Fault(headers={"Content-Length": length}, hide_length=True, cut=CUT)]
    with pytest.raises(UserError, match="Content-Length that is no number") as error:
        fetch(tmp_path / "x.zip", server, sha256=sha256)
    assert_one_line(error)
    assert len(str(error.value)) < 200
    assert len(server.seen) == 1 and list(tmp_path.iterdir()) == []


def test_the_reason_of_a_server_commands_no_terminal(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [Fault(status=503, reason="\x1b]0;owned\x07")]
    assert_only(fetch(tmp_path / "x.zip", server))
    assert r"HTTP Error 503: \x1b]0;owned\x07; next attempt" in capsys.readouterr().err


def test_a_redirect_loop_is_refused(server: Server, tmp_path: Path) -> None:
    server.faults = [redirect("/data/set.zip") for _ in range(50)]
    with pytest.raises(UserError, match="HTTP Error 302") as error:
        fetch(tmp_path / "x.zip", server)
    assert_one_line(error)


def test_a_verified_target_is_not_downloaded_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(DATA)
    fetch(target, server)
    fetch(target, server, force=True)
    assert server.seen == []
    line = f"{target}: already there, checksum verified; nothing downloaded\n"
    assert capsys.readouterr().out == line * 2


def test_a_target_that_is_no_file_is_not_replaced(server: Server) -> None:
    with pytest.raises(UserError, match="exists"):
        fetch(os.devnull, server)


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_another_file_in_the_target_is_replaced_only_by_force(
    sha256: str | None, server: Server, tmp_path: Path
) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"x\.zip: exists, .*; replace it with --force") as error:
        fetch(target, server, sha256=sha256)
    assert_one_line(error)
    assert_only(target, b"mine")
    assert server.seen == []
    assert_only(fetch(target, server, sha256=sha256, force=True))


@pytest.mark.parametrize("sha256", [SHA256, None])
@pytest.mark.parametrize("make", [os.symlink, os.link, lambda _, part: os.mkfifo(part)])
def test_a_part_that_is_no_file_of_its_own_is_refused(
    make: Callable[[Path, Path], None], sha256: str | None, server: Server, tmp_path: Path
) -> None:
    other, target = tmp_path / "other", tmp_path / "new" / "x.zip"
    other.write_bytes(b"mine")
    target.parent.mkdir()
    make(other, part_of(target))
    with pytest.raises(UserError, match=r"x\.zip\.part: ") as error:
        fetch(target, server, sha256=sha256)
    assert_one_line(error)
    assert other.read_bytes() == b"mine" and not target.exists() and not server.seen


@pytest.mark.parametrize("resumed", [False, True])
def test_a_wrong_checksum_leaves_nothing(resumed: bool, server: Server, tmp_path: Path) -> None:
    target, wrong = tmp_path / "x.zip", "0" * 64
    if resumed:
        leave_part(target, server)
    with pytest.raises(UserError, match=f"is sha256:{SHA256}, expected sha256:{wrong}") as error:
        fetch(target, server, sha256=wrong)
    assert_one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_checksum_with_force_keeps_the_old_target(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="checksum is"):
        fetch(target, server, sha256="0" * 64, force=True)
    assert_only(target, b"mine")


@pytest.mark.parametrize("hide_length", [False, True])
def test_a_missing_checksum_is_reported(
    hide_length: bool, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [Fault(hide_length=hide_length)]
    target = fetch(tmp_path / "a.zip", server, sha256=None)
    assert_only(target)
    assert capsys.readouterr().out == f"{target}: {len(DATA)} bytes, no checksum verified\n"


def test_an_empty_file_is_downloaded(server: Server, tmp_path: Path) -> None:
    server.data = b""
    assert_only(fetch(tmp_path / "x", server, sha256=hashlib.sha256().hexdigest()), b"")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "x.zip",
        "",
        "http:///x",
        "http://[bad/x",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/a\nb",
        "http://127.0.0.1/\N{SNOWMAN}",
        "http://user:secret@127.0.0.1/x",
    ],
)
def test_a_bad_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="URL") as error:
        download(tmp_path / "new" / "x", url)
    assert_one_line(error)
    assert "secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checksum", ["", "abc", "md5:" + SHA256, "sha1:" + "0" * 40, "g" * 64])
def test_a_bad_checksum_is_refused(checksum: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checksum"):
        fetch(tmp_path / "x", server, sha256=checksum)
    assert server.seen == []


def test_an_unknown_host_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(module, "_DELAYS", (0.0, 0.0))
    with pytest.raises(
        UserError, match=r"http://nowhere\.invalid/x: .*no such name.*; gave"
    ) as error:
        download(tmp_path / "x", "http://nowhere.invalid/x")
    assert_one_line(error)


def test_a_refused_connection_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "_DELAYS", (0.0, 0.0))
    with socket.socket() as closed:  # bound, not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(UserError, match=r"refused.*; gave up after 3 attempts"):
            download(tmp_path / "x", url)


def test_a_directory_that_cannot_be_made_is_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: (File exists|Not a directory)") as error:
        fetch(tmp_path / "file" / "x.zip", server)
    assert_one_line(error)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_an_unwritable_directory_is_reported(server: Server, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=os.strerror(errno.EACCES)):
        fetch(tmp_path / "x.zip", server)


def test_a_file_that_cannot_grow_is_no_network_error(server: Server, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CUT, hard))
    try:
        with pytest.raises(UserError, match=os.strerror(errno.EFBIG)) as error:
            fetch(tmp_path / "x.zip", server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(error)
    assert len(server.seen) == 1
    assert_only(fetch(tmp_path / "x.zip", server))


def test_a_download_that_is_completed_between_opening_and_locking_is_not_touched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.zip"
    part = tmp_path / "x.zip.part"

    def lock_late(file: IO[bytes]) -> bool:
        part.write_bytes(b"complete")  # the other download finishes, and lets its lock go
        part.rename(target)
        return True

    monkeypatch.setattr(module, "try_flock", lock_late)
    with pytest.raises(UserError, match="another download is writing it"):
        fetch(target, server)
    assert target.read_bytes() == b"complete" and not server.seen


def test_a_second_download_to_the_same_file_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.zip"
    request = module._request

    def meanwhile(*args: object) -> None:
        monkeypatch.setattr(module, "_request", request)
        with pytest.raises(UserError, match="another download is writing it"):
            fetch(target, server)
        request(*args)

    monkeypatch.setattr(module, "_request", meanwhile)
    assert_only(fetch(target, server))


def test_an_interrupt_leaves_the_part_to_resume(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.zip"

    class Interrupted(module.tqdm):
        def update(self, n: float | None = 1) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(target, server)
    got = part_of(target).read_bytes()
    assert got and DATA.startswith(got)
    assert not target.exists()
    server.seen.clear()
    assert_only(fetch(target, server))
    assert server.ranges == [f"bytes={len(got)}-"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_progress_bar(
    terminal: bool,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    server.faults = [Fault(cut=CUT)]
    fetch(tmp_path / "x.zip", server)
    out, err = capsys.readouterr()
    assert ("100%" in err) is terminal
    assert f"cut at {CUT} of {len(DATA)} bytes; next attempt in 0 s" in err
    assert len(out.splitlines()) == 1
