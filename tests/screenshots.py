"""Take screenshots of a run's trace review and of TensorBoard's profiler page, with Chromium.

    python -m tests.screenshots runs/profiled docs

torch-tb-profiler draws with Google Charts, which a browser loads from gstatic.com. Where that
cannot be reached, a stand-in shows each chart as a list of its values; the rest of the page is
genuine.
"""

import argparse
import contextlib
import http.server
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path

import numpy as np
from PIL import Image

from fastlab.console import UserError, run_command
from fastlab.traces.events import find_traces
from tests.browser import CHROMIUM, screenshot

_CHARTS = "https://www.gstatic.com/charts/loader.js"
_STRIPE = 40  # blank pixels between two sections of a page
_PATIENCE = 60  # seconds that TensorBoard may take to start and to read the trace


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory with a trace")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="where to write the screenshots")
    return run_command(take_both, parser.parse_args(argv))


def take_both(args: argparse.Namespace) -> None:
    run, out = args.run, args.out
    find_traces(run)
    if CHROMIUM is None:
        raise UserError("chromium, which draws the pages, is not installed; install it")
    out.mkdir(parents=True, exist_ok=True)
    page = out / "review.html"
    subprocess.run(
        [sys.executable, "-m", "fastlab", "trace", str(run), "--out", str(page)], check=True
    )
    messages = screenshot(page.resolve().as_uri(), out / "trace-review.png", 1100, 1300)
    cut(out / "trace-review.png")
    page.unlink()
    messages += tensorboard(run, out / "tensorboard.png")
    print(*messages or ["no errors on the pages"], sep="\n")


def cut(picture: Path) -> None:
    """Cut the picture off at the last blank stripe, which lies between two sections of the page."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    blank = (pixels == pixels[0, 0]).all((1, 2))
    stripes = [y for y in range(_STRIPE, len(blank) + 1) if blank[y - _STRIPE : y].all()]
    if stripes:
        Image.fromarray(pixels[: stripes[-1]]).save(picture, optimize=True)


def tensorboard(run: Path, out: Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastlab", "trace", str(run)]
    server = subprocess.Popen([*command, "--tensorboard", "--port", str(port)])
    try:
        address = f"http://localhost:{port}"
        wait_for(f"{address}/data/plugin/pytorch_profiler/runs", server)
        with charts() as options:
            page = f"{address}/#pytorch_profiler"
            return screenshot(page, out, 1400, 1300, *options, seconds=30)
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def charts() -> Generator[list[str]]:
    """The options with which the browser finds Google Charts, or the stand-in for it."""
    with contextlib.suppress(OSError), urllib.request.urlopen(_CHARTS, timeout=10):
        yield []
        return
    print(f"{_CHARTS} cannot be reached: charts are shown as lists of their values")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        server = http.server.HTTPServer(("localhost", 0), _StandIn)
        server.socket = _certified(folder).wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            target = f"localhost:{server.server_port}"
            yield [
                f"--host-resolver-rules=MAP www.gstatic.com {target}",
                "--ignore-certificate-errors",
            ]
        finally:
            server.shutdown()
            server.server_close()


class _StandIn(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = Path(__file__).with_name("charts.js").read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _certified(folder: Path) -> ssl.SSLContext:
    files = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=www.gstatic.com"
    target = ["-keyout", str(files[0]), "-out", str(files[1])]
    subprocess.run([*command.split(), *target], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    return context


def wait_for(address: str, server: subprocess.Popen) -> None:
    """Wait until the plugin lists a run."""
    deadline = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=10) as response:
                if b'"runs": []' not in response.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit("TensorBoard lists no run")


if __name__ == "__main__":
    raise SystemExit(main())
