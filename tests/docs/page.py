"""Runs the code blocks of a page of Markdown from top to bottom, in the working directory.

    python -m tests.docs.page docs/training.md

Bash runs an `sh` block; a `python` block is executed here, with the names of those before it. A
block whose first line is a comment with nothing but a file's name is written to that file instead.
A block below a line ``<!-- not run: REASON -->`` is left out.
"""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    language: str
    text: str
    where: str
    """The page and the line."""
    not_run: str | None
    """Why it is left out."""

    @property
    def file(self) -> str | None:
        """The file in which a reader saves it."""
        named = re.match(r"# ([\w/.-]+\.(?:py|toml))\n", self.text)
        return named and named[1]


_BLOCK = re.compile(
    r"^(?: *<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?"
    r" *```(?P<language>\w+)\n(?P<text>.*?)\n *```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that name their language."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            textwrap.dedent(found["text"]) + "\n",
            f"{page.name}:{content.count(chr(10), 0, found.start('text')) + 1}",
            found["reason"],
        )
        for found in _BLOCK.finditer(content)
    ]


def run(page: Path) -> None:
    """Raises what a block raises."""
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run:
            continue
        print(f"--- {block.where}", flush=True)
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), names)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
