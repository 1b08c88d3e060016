"""An S3 server on this machine (moto), which can fail, cut connections and be slow on request."""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest


@dataclass
class Faults:
    """What happens to the GET requests of objects, counted from the moment that it is set."""

    throttle_every: int = 0
    """Each n-th is refused: 503 SlowDown."""
    cut_every: int = 0
    """Of each n-th, only half of the body arrives before the connection ends."""
    delay: float = 0.0
    """Seconds that each takes longer."""
    _count: itertools.count = field(default_factory=lambda: itertools.count(1))


@dataclass
class S3:
    url: str
    """Of the server, http."""
    environment: dict[str, str]
    """For the processes that shall use it."""
    faults: Faults = field(default_factory=Faults)
    gets: list[str] = field(default_factory=list)
    """Paths of the GET requests of objects so far."""

    def bucket(self, name: str, folder: Path | None = None) -> str:
        """The URL of a new bucket that holds a copy of the files of `folder`."""
        import fsspec

        files = fsspec.filesystem("s3", endpoint_url=self.url, skip_instance_cache=True)
        files.mkdir(name)
        for path in sorted(folder.rglob("*")) if folder else ():
            if path.is_file():
                files.put_file(str(path), f"{name}/{path.relative_to(folder)}")
        return f"s3://{name}"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Generator[S3]:
    """A fresh server; this process and those that it starts use it for every ``s3://`` URL."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()


@contextlib.contextmanager
def server() -> Generator[S3]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # otherwise a line for each request
    application = DomainDispatcherApplication(create_backend_app)
    running: list[S3] = []
    served = make_server(
        "127.0.0.1", 0, lambda *request: _answer(running[0], application, *request), threaded=True
    )
    url = f"http://127.0.0.1:{served.server_port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",  # botocore's own, with pauses of seconds between them
    }
    running.append(S3(url, environment))
    thread = threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield running[0]
    finally:
        # All of moto's servers in a process share their buckets.
        urlopen(Request(f"{url}/moto-api/reset", method="POST")).close()
        served.shutdown()
        thread.join()
        served.server_close()


def _answer(
    s3: S3, application: Callable, environ: dict[str, Any], start: Callable
) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if environ["REQUEST_METHOD"] != "GET" or path.count("/") < 2 or path.endswith("/"):
        return application(environ, start)
    s3.gets.append(path)
    faults = s3.faults
    number = next(faults._count)
    time.sleep(faults.delay)
    if faults.throttle_every and number % faults.throttle_every == 0:
        start("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"]
    body = application(environ, start)
    if faults.cut_every and number % faults.cut_every == 0:
        return _half(body)
    return body


def _half(body: Iterable[bytes]) -> Generator[bytes]:
    whole = b"".join(body)
    yield whole[: len(whole) // 2]
    raise ConnectionAbortedError("cut on request")
