"""Hook of MkDocs: the site mirrors the repository, so that relative links work in both."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# The pages, and the files to which they link.
MIRRORED = (
    "*.md",
    "docs/*.md",
    "docs/*.png",
    "docs/*.ipynb",
    "benchmarks/**/README.md",
    "benchmarks/results/*/*.png",
    "benchmarks/results/*/traces/*.html",
    "pipelines/README.md",
    "configs/**/*.toml",
    "fastlab/config.py",
    "fastlab/study/spec.py",
    "examples/*.*",
    "LICENSE",
)


def on_files(files: Files, config: Any) -> None:
    """Give each file its path in the repository, and each notebook a page beside it."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(path for pattern in MIRRORED for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
        if path.suffix == ".ipynb":
            page = name.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, page, content=as_markdown(path)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Numbered lists as Python-Markdown wants them: a blank line before each item, and four spaces
    instead of three below it."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"^(?=   )", " ", part, flags=re.MULTILINE) for part in parts[::2]]
    parts[::2] = [re.sub(r"\n(?=\d+\. )", "\n\n", part) for part in parts[::2]]
    return "".join(parts)


def as_markdown(notebook: Path) -> str:
    """The cells of a notebook, without what they printed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(
        f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts
    )
