"""A headless Chromium that loads pages, takes screenshots and collects console messages."""

import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")

# Chromium loads only what it is asked for, and its profile is deleted with the page.
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--hide-scrollbars"),
)
# A window of Chromium is at least 500 pixels wide; a frame in it can be as narrow as a phone.
_FRAME = """<iframe style="border:0;height:900px;width:{width}px" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  {script}
  document.title = `needs ${{page.documentElement.scrollWidth}}`;
}}</script>"""


class Loaded(NamedTuple):
    messages: list[str]
    """Messages on the page's console, such as errors."""
    width: int
    """The width that the page needs, in CSS pixels. It scrolls sideways in a narrower window."""


def load(page: Path, width: int, script: str = "") -> Loaded:
    """Load a self-contained page into a window of `width` CSS pixels, and run `script` on it, to
    which the page's document is known as `page`; what it throws is among the messages."""
    content = html.escape(page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        frame = Path(scratch) / "page.html"
        frame.write_text(_FRAME.format(width=width, page=content, script=script), encoding="utf-8")
        dom, log = _run(f"file://{frame}", 1400, 1000, "--dump-dom")
    title = re.search(r"<title>needs (\d+)</title>", dom)
    return Loaded(_console(log), int(title[1]) if title else -1)


def screenshot(
    address: str, out: Path, width: int, height: int, *options: str, seconds: int = 5
) -> list[str]:
    """Write a screenshot of `address` to `out` after `seconds` of the page's own, virtual time.

    `options` are passed to Chromium. Returns the messages on the page's console.
    """
    _, log = _run(
        address,
        width,
        height,
        f"--screenshot={out.resolve()}",
        f"--virtual-time-budget={1000 * seconds}",
        *options,
    )
    return _console(log)


def rendered(address: str, seconds: int = 5) -> tuple[str, list[str]]:
    """The document at `address` after `seconds` of the page's own, virtual time, as HTML, and the
    messages on its console."""
    budget = f"--virtual-time-budget={1000 * seconds}"
    dom, log = _run(address, 1100, 1000, "--dump-dom", budget)
    return dom, _console(log)


def _run(address: str, width: int, height: int, *options: str) -> tuple[str, str]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        result = subprocess.run(
            [
                *(CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}"),
                *(f"--window-size={width},{height}", *options, address),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    return result.stdout, result.stderr


def _console(log: str) -> list[str]:
    return [line for line in log.splitlines() if ":CONSOLE" in line]
