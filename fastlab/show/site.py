"""What the page's addresses answer: its files, and JSON about the run, pictures and mistakes."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastlab.predict import MAX_BYTES, Predictor
from fastlab.report.page import render
from fastlab.runs import RunDir
from fastlab.show.mistakes import PAGE, Choice, Mistakes
from fastlab.training.review import png

_PAGE = Path(__file__).with_name("page")


class Site:
    """The page of one run, and its model."""

    files: Mapping[str, tuple[str, bytes]]
    """Path -> media type and content of what is the same for every run."""
    reads: Mapping[str, Callable[[dict[str, int]], Any]]
    """Path -> what answers GET with a value of JSON's types, from the numbers in the query. Raises
    `UserError`."""
    posts: Mapping[str, Callable[[bytes], Any]]
    """Path -> what answers POST in the same way, from the body. Raises `CorruptImage`."""

    def __init__(self, run: RunDir, which: str, data: str | None) -> None:
        """`which` and `data` are those of `Predictor`. Raises `UserError` as it does."""
        self._run, self._which = run, which
        self._predictor = Predictor(run, which, data)
        # Images go through the model one request at a time: it is shared, and so are torch's
        # settings of the whole process.
        self._lock = threading.Lock()
        self.files = {
            "/": ("text/html; charset=utf-8", (_PAGE / "index.html").read_bytes()),
            "/show.js": ("text/javascript; charset=utf-8", (_PAGE / "show.js").read_bytes()),
            "/show.css": ("text/css; charset=utf-8", _style()),
        }
        self.reads = {
            "/about": lambda query: self._about(),
            "/mistakes": lambda query: self._mistakes.overview(),
            "/mistakes/images": lambda query: self._mistakes.chosen(Choice(**query)),
        }
        self.posts = {"/predict": self._predict}
        self._mistakes = Mistakes(run, data, self._predictor, self._lock)

    def close(self) -> None:
        """Wait for what the model computes, and let nothing follow: a thread that torch is busy in
        would crash when Python ends."""
        self._mistakes.close()
        self._lock.acquire()

    def _about(self) -> dict[str, Any]:
        return {
            "run": self._run.path.resolve().name,
            "checkpoint": self._which,
            "model": self._predictor.cfg.model.name,
            "classes": len(self._predictor.spec.classes),
            "side": self._predictor.spec.image_size,
            "max_bytes": MAX_BYTES,
            "page": PAGE,
        }

    def _predict(self, picture: bytes) -> dict[str, Any]:
        """What the model sees in the image file `picture`: seen, the decoded pixels as PNG in
        base64, and predicted, the five most probable classes."""
        with self._lock:
            pixels = self._predictor.decode(picture)
            (best,) = self._predictor.guesses(pixels[None])
        predicted = [{"class": each.id, "name": each.words, "probability": p} for each, p in best]
        return {"seen": png(pixels), "predicted": predicted}


def _style() -> bytes:
    return (render("style.css.j2") + (_PAGE / "show.css").read_text(encoding="utf-8")).encode()
