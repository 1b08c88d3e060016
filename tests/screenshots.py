"""Pictures of a run's trace review and of TensorBoard's profiler page, by a headless Chromium.

python -m tests.screenshots runs/profiled docs
"""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.browser import shoot

_PATIENCE = 60  # seconds that TensorBoard may take to start and to read the trace


def main(run: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    page = out / "review.html"
    subprocess.run(
        [sys.executable, "-m", "fastlab", "trace", str(run), "--out", str(page)], check=True
    )
    complaints = shoot(page.resolve().as_uri(), out / "trace-review.png", 1100, 1300)
    page.unlink()
    complaints += tensorboard(run, out / "tensorboard.png")
    print(*complaints or ["no complaints"], sep="\n")


def tensorboard(run: Path, out: Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastlab", "trace", str(run)]
    server = subprocess.Popen([*command, "--tensorboard", "--port", str(port)])
    try:
        address = f"http://localhost:{port}"
        wait_for(f"{address}/data/plugin/pytorch_profiler/runs", server)
        return shoot(f"{address}/#pytorch_profiler", out, 1400, 1000, patience=30)
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen) -> None:
    """Until the plugin lists a run."""
    deadline = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=10) as found:
                if b'"runs": []' not in found.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit("TensorBoard lists no run")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
