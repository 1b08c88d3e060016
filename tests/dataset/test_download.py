import errno
import hashlib
import io
import json
import os
import random
import re
import socket
import struct
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastlab.console import UserError
from fastlab.dataset import download as module
from fastlab.dataset.download import TINY_IMAGENET, Archive, download


def make_zip(seed: int, size: int = 300_000) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.bin"), random.Random(seed).randbytes(size))
    return buffer.getvalue()


DATA = make_zip(1)
OTHER = make_zip(2)
CUT = 100_000
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = "md5:" + hashlib.md5(DATA, usedforsecurity=False).hexdigest()


@dataclass
class Fault:
    """What one request gets instead of a plain right answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of body, then the connection ends
    stall: int | None = None  # bytes of body, then silence
    reset: bool = False  # the cut is a reset, not an orderly end
    hide_length: bool = False
    ignore_range: bool = False
    ignore_if_range: bool = False


@dataclass
class Seen:
    method: str
    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    body: int = 0


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else Fault()
        asked = self.headers["Range"], self.headers["If-Range"]
        self.seen = Seen(self.command, self.path, *asked)
        self.server.seen.append(self.seen)
        if fault.status is not None:
            return self.send(fault.status, b"error page", fault)
        data = self.server.data
        current = self.headers["If-Range"] in (None, self.server.etag, self.server.modified)
        if asked[0] is None or fault.ignore_range or not (current or fault.ignore_if_range):
            return self.send(200, data, fault)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked[0])[1])
        if start >= len(data):
            fault.headers["Content-Range"] = f"bytes */{len(data)}"
            return self.send(416, b"", fault)
        content_range = f"bytes {start}-{len(data) - 1}/{len(data)}"
        fault.headers = {"Content-Range": content_range} | fault.headers
        self.send(206, data[start:], fault)

    def send(self, status: int, body: bytes, fault: Fault) -> None:
        self.seen.status = status
        self.send_response(status)
        if not fault.hide_length:
            self.send_header("Content-Length", str(len(body)))
        for name, value in (("ETag", self.server.etag), ("Last-Modified", self.server.modified)):
            if value:
                self.send_header(name, value)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
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
        self.etag: str | None = '"one"'
        self.modified: str | None = "Mon, 01 Jan 2024 00:00:00 GMT"
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


def fetch(out: Path | str, server: Server, **options: object) -> Path:
    settings = {"url": server.url, "sha256": SHA256, "progress": False, "delay": 0.0}
    return download(out, **(settings | options))


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def sidecar_of(target: Path) -> Path:
    return target.with_name(target.name + ".part.json")


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


def test_official_archive_stands_in_one_place() -> None:
    assert TINY_IMAGENET.url == "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    assert TINY_IMAGENET.checksum == "md5:90528d7ca1a48142e341f4ef8d21d0de"
    assert TINY_IMAGENET.size == 248100043


@pytest.mark.parametrize("checksum", [SHA256, SHA256.upper(), "sha256:" + SHA256, MD5])
def test_plain_download(
    checksum: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = fetch(tmp_path / "x.zip", server, sha256=checksum)
    assert target == tmp_path / "x.zip"
    assert_only(target)
    assert server.ranges == [None]
    out, err = capsys.readouterr()
    kind = "md5" if checksum == MD5 else "sha256"
    assert out == f"{target}: {len(DATA)} bytes, {kind} verified\n"
    assert err == ""


def test_default_url_brings_its_checksum_and_size(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TINY_IMAGENET", Archive(server.url, MD5, len(DATA)))
    assert_only(fetch(tmp_path / "a.zip", server, sha256=None))
    server.data = DATA + b"!"
    with pytest.raises(UserError, match=f"offers {len(DATA) + 1} bytes, expected {len(DATA)}"):
        fetch(tmp_path / "b.zip", server, sha256=None)
    assert_only(tmp_path / "a.zip")


def test_out_is_a_directory_or_ends_in_slash(server: Server, tmp_path: Path) -> None:
    assert fetch(tmp_path, server) == tmp_path / "set.zip"
    assert fetch(f"{tmp_path}/new/", server) == tmp_path / "new" / "set.zip"
    assert fetch(tmp_path / "deep" / "file", server) == tmp_path / "deep" / "file"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/..%2F..%2Fevil.zip", "evil.zip"),
        ("/a/..%5Cevil.zip", "evil.zip"),
        ("/.evil", "evil"),
        ("/a%00%0Ab%20c.zip?x=/../y", "a__b_c.zip"),
    ],
)
def test_file_name_from_url_stays_in_the_directory(
    path: str, name: str, server: Server, tmp_path: Path
) -> None:
    assert fetch(tmp_path, server, url=server.root + path) == tmp_path / name
    assert_only(tmp_path / name)


@pytest.mark.parametrize("path", ["", "/", "/..", "/a/%2e%2e", "/..%2f..", "/?a=b.zip"])
def test_url_without_file_name(path: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file name"):
        fetch(tmp_path, server, url=server.root + path)
    assert server.seen == []


@pytest.mark.parametrize("reset", [False, True])
def test_resumes_after_cuts(reset: bool, server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=CUT, reset=reset), Fault(cut=CUT)]
    assert_only(fetch(tmp_path / "x.zip", server))
    if not reset:  # a reset may lose what was on its way
        assert server.ranges == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
        assert [seen.if_range for seen in server.seen] == [None, '"one"', '"one"']
        assert server.served == len(DATA)
    assert server.served < 2 * len(DATA)


def test_resumes_in_a_later_call(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    assert_only(fetch(target, server))
    assert server.ranges == [f"bytes={CUT}-"]
    assert server.served == len(DATA) - CUT


def test_resumes_after_a_stall(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(stall=CUT)]
    assert_only(fetch(tmp_path / "x.zip", server, timeout=0.2))
    assert server.ranges == [None, f"bytes={CUT}-"]


def test_silent_server_is_given_up(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(stall=0), Fault(stall=0)]
    with pytest.raises(UserError, match="timed out; gave up after 2 attempts") as error:
        fetch(tmp_path / "x.zip", server, timeout=0.05, attempts=2)
    assert_one_line(error)


def test_progress_renews_the_attempts(server: Server, tmp_path: Path) -> None:
    step = len(DATA) // 8
    server.faults = [Fault(cut=step) for _ in range(8)]
    assert_only(fetch(tmp_path / "x.zip", server, attempts=2))
    assert len(server.seen) == 9


def test_no_further_than_before_is_no_progress(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=CUT, ignore_range=True) for _ in range(50)]
    with pytest.raises(UserError, match="gave up after 3 attempts"):
        fetch(tmp_path / "x.zip", server, attempts=3)
    assert len(server.seen) == 3


def test_backoff_doubles_up_to_a_limit(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.faults = [Fault(status=503) for _ in range(20)]
    with pytest.raises(UserError, match="HTTP 503"):
        fetch(tmp_path / "x.zip", server, attempts=6, delay=4.0)
    assert waits == [4, 8, 16, 30, 30]


def test_starts_again_when_range_is_ignored(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.faults = [Fault(ignore_range=True)]
    assert_only(fetch(target, server))
    assert server.ranges == [f"bytes={CUT}-"]
    assert server.served == len(DATA)


@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_starts_again_when_the_remote_changed(
    ignore_if_range: bool, server: Server, tmp_path: Path
) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.data, server.etag = OTHER, '"two"'
    server.faults = [Fault(ignore_if_range=ignore_if_range)]
    assert_only(fetch(target, server, sha256=None), OTHER)
    assert server.seen[0].if_range == '"one"'
    assert [seen.status for seen in server.seen] == ([206, 200] if ignore_if_range else [200])


@pytest.mark.parametrize(
    "content_range", ["", f"bytes 0-9/{len(DATA)}", f"bytes {CUT}-9/7", "bytes x-y/z"]
)
def test_starts_again_on_a_wrong_content_range(
    content_range: str, server: Server, tmp_path: Path
) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.faults = [Fault(headers={"Content-Range": content_range})]
    assert_only(fetch(target, server))
    assert server.ranges == [f"bytes={CUT}-", None]


def test_content_range_without_total(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    unknown = {"Content-Range": f"bytes {CUT}-{len(DATA) - 1}/*"}
    server.faults = [Fault(headers=unknown, cut=CUT)]
    assert_only(fetch(target, server))
    assert server.ranges == [f"bytes={CUT}-", f"bytes={2 * CUT}-"]


@pytest.mark.parametrize(
    ("etag", "modified", "resumed_by"),
    [
        (None, "Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ('W/"weak"', "Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ('W/"weak"', None, None),
        (None, None, None),
    ],
)
def test_if_range_takes_only_usable_validators(
    etag: str | None,
    modified: str | None,
    resumed_by: str | None,
    server: Server,
    tmp_path: Path,
) -> None:
    server.etag, server.modified = etag, modified
    server.faults = [Fault(cut=CUT)]
    assert_only(fetch(tmp_path / "x.zip", server))
    assert server.seen[1].if_range == resumed_by
    assert server.ranges == [None, f"bytes={CUT}-" if resumed_by else None]


@pytest.mark.parametrize("sidecar", [None, "", "{", "[]", "7", '{"url": "x"}', "other url"])
def test_part_of_unknown_origin_is_not_resumed(
    sidecar: str | None, server: Server, tmp_path: Path
) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    if sidecar == "other url":
        known = json.loads(sidecar_of(target).read_text())
        sidecar = json.dumps(known | {"url": "http://127.0.0.1/other.zip"})
    if sidecar is None:
        sidecar_of(target).unlink()
    else:
        sidecar_of(target).write_text(sidecar)
    assert_only(fetch(target, server))
    assert server.ranges == [None]


def test_complete_part_is_only_verified(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    part_of(target).write_bytes(DATA)
    assert_only(fetch(target, server))
    assert [seen.status for seen in server.seen] == [416]
    assert server.served == 0


def test_part_longer_than_the_remote_starts_again(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    part_of(target).write_bytes(DATA + b"!")
    assert_only(fetch(target, server))
    assert [seen.status for seen in server.seen] == [416, 200]


@pytest.mark.parametrize("status", [206, 416, 204])
def test_unasked_answers_end(status: int, server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(status=status) for _ in range(50)]
    with pytest.raises(UserError, match=f"HTTP {status} is no answer .* gave up"):
        fetch(tmp_path / "x.zip", server)
    assert len(server.seen) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_status_is_retried(status: int, server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(status=status), Fault(status=status)]
    assert_only(fetch(tmp_path / "x.zip", server))
    assert [seen.status for seen in server.seen] == [status, status, 200]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 304])
def test_final_status_is_not_retried(status: int, server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(status=status)]
    with pytest.raises(UserError, match=f"HTTP {status}") as error:
        fetch(tmp_path / "x.zip", server)
    assert_one_line(error)
    assert len(server.seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_final_status_keeps_the_part(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    server.faults = [Fault(status=404)]
    with pytest.raises(UserError, match="HTTP 404"):
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


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[x/"])
def test_redirect_elsewhere_than_http(location: str, server: Server, tmp_path: Path) -> None:
    server.faults = [redirect(location)]
    with pytest.raises(UserError) as error:
        fetch(tmp_path / "x.zip", server)
    assert_one_line(error)
    assert len(server.seen) == 1


def test_redirect_loop(server: Server, tmp_path: Path) -> None:
    server.faults = [redirect("/data/set.zip") for _ in range(50)]
    with pytest.raises(UserError, match="HTTP 302") as error:
        fetch(tmp_path / "x.zip", server)
    assert_one_line(error)


def test_present_and_right(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(DATA)
    fetch(target, server)
    fetch(target, server, force=True)
    assert server.seen == []
    line = f"{target}: already there, sha256 verified; nothing downloaded\n"
    assert capsys.readouterr().out == line * 2


def test_present_and_right_without_checksum(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(DATA)
    server.faults = [Fault(status=503)]
    fetch(target, server, sha256=None)
    assert [seen.method for seen in server.seen] == ["HEAD", "HEAD"]
    assert "no checksum verified; nothing downloaded" in capsys.readouterr().out


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_present_and_different(sha256: str | None, server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"x\.zip: exists and is .*, expected ") as error:
        fetch(target, server, sha256=sha256)
    assert_one_line(error)
    assert_only(target, b"mine")
    assert server.served == 0
    assert_only(fetch(target, server, sha256=sha256, force=True))


@pytest.mark.parametrize("fault", [Fault(status=405), Fault(hide_length=True)])
def test_present_and_not_comparable(fault: Fault, server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(DATA)
    server.faults = [fault]
    with pytest.raises(UserError, match="exists, and can't be compared: http"):
        fetch(target, server, sha256=None)
    assert_only(target)


def test_target_that_appears_meanwhile_is_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.zip"
    verify = module._verify

    def slow_verify(job: object) -> str:
        target.write_bytes(b"mine")
        return verify(job)

    monkeypatch.setattr(module, "_verify", slow_verify)
    with pytest.raises(UserError, match="appeared during the download"):
        fetch(target, server)
    assert target.read_bytes() == b"mine"


def test_target_is_no_file(server: Server) -> None:
    with pytest.raises(UserError, match="is not a file"):
        fetch(os.devnull, server)


@pytest.mark.parametrize("resumed", [False, True])
def test_checksum_mismatch_leaves_nothing(resumed: bool, server: Server, tmp_path: Path) -> None:
    target, wrong = tmp_path / "x.zip", "0" * 64
    if resumed:
        leave_part(target, server)
    with pytest.raises(UserError, match=f"is sha256:{SHA256}, expected sha256:{wrong}") as error:
        fetch(target, server, sha256=wrong)
    assert_one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_mismatch_with_force_keeps_the_old_target(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="checksum is"):
        fetch(target, server, sha256="0" * 64, force=True)
    assert_only(target, b"mine")


def test_no_checksum_is_told(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(tmp_path / "a.zip", server, sha256=None)
    fetch(tmp_path / "b", server, sha256=None, url=server.root + "/b")
    server.faults = [Fault(hide_length=True)]
    fetch(tmp_path / "c", server, sha256=None, url=server.root + "/c")
    a, b, c = capsys.readouterr().out.splitlines()
    assert a.endswith("no checksum verified (size as stated by the server, zip directory readable)")
    assert b.endswith("no checksum verified (size as stated by the server)")
    assert c.endswith("no checksum verified (no size stated by the server)")


@pytest.mark.parametrize("data", [b"<html>sorry</html>", DATA[:-50], b""])
def test_no_checksum_and_no_zip(data: bytes, server: Server, tmp_path: Path) -> None:
    server.data = data
    with pytest.raises(UserError, match="not a whole zip file") as error:
        fetch(tmp_path / "x", server, sha256=None)
    assert_one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_unstated_size_against_the_expected(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(hide_length=True, cut=CUT)]
    assert_only(fetch(tmp_path / "x.zip", server, sha256=None, size=len(DATA)))
    assert len(server.seen) == 2


def test_expected_size_holds_for_a_complete_part(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    leave_part(target, server)
    part_of(target).write_bytes(DATA)
    with pytest.raises(UserError, match=f"size is {len(DATA)} bytes, expected 5"):
        fetch(target, server, sha256=None, size=5)
    assert list(tmp_path.iterdir()) == []


def test_empty_file(server: Server, tmp_path: Path) -> None:
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
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/a\nb",
        "http://127.0.0.1/\N{SNOWMAN}",
        "http://user:secret@127.0.0.1/x",
    ],
)
def test_bad_url(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="URL") as error:
        download(tmp_path / "new" / "x", url)
    assert_one_line(error)
    assert "secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checksum", ["", "abc", "md5:" + SHA256, "sha1:" + "0" * 40, "g" * 64])
def test_bad_checksum(checksum: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checksum"):
        fetch(tmp_path / "x", server, sha256=checksum)
    assert server.seen == []


@pytest.mark.parametrize(("code", "tries"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 5)])
def test_unknown_host(
    code: int, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def getaddrinfo(*args: object, **options: object) -> None:
        calls.append(args)
        raise socket.gaierror(code, "no such name")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(UserError, match=r"http://nowhere\.invalid/x: no such name") as error:
        download(tmp_path / "x", "http://nowhere.invalid/x", progress=False, delay=0.0)
    assert_one_line(error)
    assert len(calls) == tries


def test_refused_connection_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:  # bound, not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(UserError, match="refused; gave up after 3 attempts"):
            download(tmp_path / "x", url, progress=False, attempts=3, delay=0.0)


def test_directory_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: (File exists|Not a directory)") as error:
        fetch(tmp_path / "file" / "x.zip", server)
    assert_one_line(error)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_unwritable_directory(server: Server, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=os.strerror(errno.EACCES)):
        fetch(tmp_path / "x.zip", server)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_no_space(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path / "x.zip").symlink_to("/dev/full")
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)) as error:
        fetch(tmp_path / "x.zip", server)
    assert_one_line(error)
    assert len(server.seen) == 1


def test_a_second_download_to_the_same_file_is_turned_away(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.zip"
    receive = module._receive

    def meanwhile(*args: object) -> None:
        monkeypatch.setattr(module, "_receive", receive)
        with pytest.raises(UserError, match="another download is writing it"):
            fetch(target, server)
        receive(*args)

    monkeypatch.setattr(module, "_receive", meanwhile)
    assert_only(fetch(target, server))
    target.unlink()
    part_of(target).with_name("x.zip.part.lock").touch()  # of one that was killed
    assert_only(fetch(target, server))


def test_interrupt_leaves_the_part(
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


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (None, False), (False, False)])
def test_progress_bar_off_a_terminal(
    progress: bool | None,
    shown: bool,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.faults = [Fault(cut=CUT)]
    fetch(tmp_path / "x.zip", server, progress=progress)
    out, err = capsys.readouterr()
    assert ("100%" in err) is shown
    assert f"cut at {CUT} of {len(DATA)} bytes; next attempt in 0 s" in err
    assert len(out.splitlines()) == 1
