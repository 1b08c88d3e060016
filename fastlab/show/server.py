"""The server of the page: who may ask, how much, and what an error looks like."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qsl

from fastlab.console import UserError, first_line, tell
from fastlab.dataset.decode import CorruptImage
from fastlab.files import without_nan
from fastlab.predict import MAX_BYTES
from fastlab.processes import interrupted_by_signals
from fastlab.runs import RunDir
from fastlab.show.site import Site

_ADDRESS = "127.0.0.1"
# Any port: that of an SSH tunnel is another one.
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
_NUMBERS = ("label", "guess", "start")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_Answer = tuple[str, bytes]
"""Media type and content."""


def run(args: Namespace) -> None:
    """Run `fastlab show` until a signal ends it. Raises `UserError` where the port is taken or the
    run cannot be read."""
    with (
        interrupted_by_signals(),
        open_server(args.port) as server,  # before the model is loaded, which takes seconds
        closing(Site(RunDir(args.run), args.checkpoint, args.data)) as server.site,
        suppress(KeyboardInterrupt),
    ):
        print(f"http://{_ADDRESS}:{server.server_port}/  (Ctrl-C stops it)", flush=True)
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """Serves `site`, which is set before the first request is answered."""

    site: Site

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Only the connection has failed: what else can is answered in `_Handler._answer`."""


def open_server(port: int) -> Server:
    """A server that listens on `port` of this machine alone; 0: on a free one. Raises `UserError`
    where it is taken."""
    try:
        return Server((_ADDRESS, port), _Handler)
    except OSError as error:
        raise UserError(
            f"--port {port}: cannot be used ({error.strerror}); give another one, or --port 0 for "
            f"any that is free"
        ) from None


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        self.status, self.reason = status, reason


class _Handler(BaseHTTPRequestHandler):
    """Answers one request in a thread of its own."""

    timeout = 30  # seconds that a client may take for each part of its request

    def do_GET(self) -> None:
        self._answer(self._read)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is for what the user should know."""

    @property
    def _site(self) -> Site:
        return cast(Server, self.server).site

    def _answer(self, find: Callable[[str, str], _Answer]) -> None:
        path, _, query = self.path.partition("?")
        status = HTTPStatus.OK
        try:
            self._check_host()
            kind, content = find(path, query)
        except (ConnectionError, TimeoutError):
            raise  # of the client, whom no answer reaches
        except _Refused as refusal:
            status, (kind, content) = refusal.status, _error(refusal.reason)
        except CorruptImage as error:
            status, (kind, content) = HTTPStatus.BAD_REQUEST, _error(f"not an image ({error})")
        except UserError as error:
            status, (kind, content) = HTTPStatus.INTERNAL_SERVER_ERROR, _error(str(error))
        except Exception as error:  # a defect in one answer must not end the others
            tell(f"{path}: {type(error).__name__}: {first_line(error)}")
            status, (kind, content) = HTTPStatus.INTERNAL_SERVER_ERROR, _error(first_line(error))
        self._send(status, kind, content)

    def _read(self, path: str, query: str) -> _Answer:
        if path in self._site.files:
            return self._site.files[path]
        self._check_origin()
        if path not in self._site.reads:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        return _json(self._site.reads[path](_numbers(query)))

    def _post(self, path: str, query: str) -> _Answer:
        self._check_origin()
        if path not in self._site.posts:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        return _json(self._site.posts[path](self._body()))

    def _check_host(self) -> None:
        """A name that another site had resolved to this machine (DNS rebinding) is refused."""
        if not _HOST.fullmatch(self.headers.get("Host", "")):
            raise _Refused(HTTPStatus.FORBIDDEN, "this page answers to 127.0.0.1 and localhost")

    def _check_origin(self) -> None:
        """The pages of other sites are refused. A client that is no browser names no origin."""
        own = f"http://{self.headers['Host']}"
        site = self.headers.get("Sec-Fetch-Site", "none")
        if self.headers.get("Origin", own) != own or site not in ("same-origin", "none"):
            raise _Refused(HTTPStatus.FORBIDDEN, "other sites may not use this page")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
        if int(length) > MAX_BYTES:
            limit = f"larger than {MAX_BYTES // 10**6} MB, which no image needs"
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
        return self.rfile.read(int(length))

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _numbers(query: str) -> dict[str, int]:
    numbers = {}
    for name, value in parse_qsl(query):
        if name not in _NUMBERS or not re.fullmatch("[0-9]{1,9}", value):
            known = ", ".join(_NUMBERS)
            raise _Refused(HTTPStatus.BAD_REQUEST, f"expected whole numbers as {known}")
        numbers[name] = int(value)
    return numbers


def _json(value: Any) -> _Answer:
    return "application/json", json.dumps(without_nan(value)).encode()


def _error(reason: str) -> _Answer:
    return _json({"error": reason})
