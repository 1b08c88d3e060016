"""A headless Chromium: what a page looks like, and what it complains about."""

import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")

# Only what is asked for is loaded: no look-ups of its own, no profile that outlives the page.
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--hide-scrollbars"),
)
# A window of Chromium's is 500 pixels wide at least, a frame in it can be as narrow as a phone.
_FRAME = """<iframe style="border:0;height:900px;width:{width}px" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  document.title = `needs ${{root.scrollWidth}}`;
}}</script>"""


class Seen(NamedTuple):
    complaints: list[str]
    """Of the page's own console."""
    width: int
    """What the page needs, CSS pixels: more than the window's means that it scrolls sideways."""


def look(page: Path, width: int) -> Seen:
    """Load a self-contained page into a window of `width` CSS pixels."""
    content = html.escape(page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        around = Path(scratch) / "page.html"
        around.write_text(_FRAME.format(width=width, page=content), encoding="utf-8")
        dom, log = _run(f"file://{around}", 1400, 1000, "--dump-dom")
    found = re.search(r"<title>needs (\d+)</title>", dom)
    return Seen(_complaints(log), int(found[1]) if found else -1)


def shoot(
    address: str, out: Path, width: int, height: int, *options: str, patience: int = 5
) -> list[str]:
    """A picture of `address` after `patience` seconds of its own time; returns its complaints.
    `options` are Chromium's."""
    _, log = _run(
        address,
        width,
        height,
        f"--screenshot={out.resolve()}",
        f"--virtual-time-budget={1000 * patience}",
        *options,
    )
    return _complaints(log)


def _run(address: str, width: int, height: int, *more: str) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                *(CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}"),
                *(f"--window-size={width},{height}", *more, address),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    return done.stdout, done.stderr


def _complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if ":CONSOLE" in line]
