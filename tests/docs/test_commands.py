"""The code blocks of README and of the pages are run as they stand, or marked with the reason why
not; the options of every command exist."""

import importlib.util
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlab import cli, config
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.synth import synthesise
from fastlab.study.spec import read_study
from tests.docs.page import Block, blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their commands are checked, but not run: `make test` and `make faults` do so, or benchmarks do.
OTHERS = [
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "RELIABILITY")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "pipelines")),
]


# Optional packages that the blocks of a page use.
NEEDED = {
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "models": ("timm",),
}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_run(page: Path) -> bool:
    return any(block.language in ("sh", "python") and not block.not_run for block in blocks(page))


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """That of a reader who put `.venv/bin` on the PATH. Coverage is not measured, for it takes a
    quarter of the time."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    folders = [str(Path(sys.executable).parent), kept["PATH"]]
    own = {"PATH": os.pathsep.join(folders), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**kept, **own}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, environment) -> Path:
    """What pages name of a checkout after `make demo`, with a tenth of its images; and photos."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, path / name)
    for name in ("fastlab", "benchmarks", "pipelines"):
        (path / name).symlink_to(ROOT / name)
    originals = path / "demo" / "originals"
    synthesise(originals, classes=10, per_class=20)
    convert(originals, path / "demo" / "dataset", Options())
    shutil.copytree(originals / "train", path / "photos")
    shutil.copy(min(originals.glob("val/images/*")), path / "photo.jpg")
    train = ["fastlab", "train", "--config", "configs/demo.toml", "--out", "demo/run"]
    subprocess.run(train, cwd=path, env=environment, check=True, capture_output=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page)], ids=named)
def test_the_blocks_of_a_page_run_as_they_stand(page, checkout, environment, tmp_path):
    missing = [name for name in NEEDED.get(page.stem, ()) if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    scratch = tmp_path / "checkout"
    shutil.copytree(checkout, scratch, symlinks=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.page", str(page)],
        cwd=scratch,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout


def scripts(language: str, pages: list[Path]) -> list[Block]:
    return [block for page in pages for block in blocks(page) if block.language == language]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=named)
def test_every_mark_stands_above_a_block(page):
    reasons = re.findall(r"^ *<!-- not run", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(reasons) == sum(bool(block.not_run) for block in blocks(page))


@pytest.mark.parametrize("block", scripts("sh", [*PAGES, *OTHERS]), ids=lambda block: block.where)
def test_the_options_of_every_command_exist(block, monkeypatch):
    for words in commands(block.text):
        check(words, monkeypatch)


@pytest.mark.parametrize("block", scripts("sh", PAGES), ids=lambda block: block.where)
def test_the_settings_of_every_command_exist(block):
    for words in commands(block.text):
        pairs = list(itertools.pairwise(words))
        settings = [value for option, value in pairs if option == "--set"]
        files = [ROOT / value for option, value in pairs if option == "--config"]
        config.load(files[0] if files and files[0].exists() else None, settings)


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a script, without comments and assignments before them."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        for between, words in itertools.groupby(lexer, lambda word: set(word) <= set(";&|")):
            if not between:
                yield list(itertools.dropwhile(re.compile(r"\w+=").match, words))


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises SystemExit for an option that does not exist."""
    words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    match words:
        case ["fastlab", name, *options] | ["python" | "python3", "-m", "fastlab", name, *options]:
            check_fastlab(name, options)
        case ["python" | "python3", "fastlab/train.py", *options]:
            check_fastlab("train", options)
        case ["torchrun", *_]:
            launched = importlib.import_module("torch.distributed.run").get_args_parser()
            check_launched(launched.parse_args(words[1:]))
        case ["accelerate", "launch", *options]:
            launched = importlib.import_module("accelerate.commands.launch").launch_command_parser()
            check_launched(launched.parse_args(options))
        case ["python", "-m", "benchmarks.ablations", *options]:
            check_fastlab("study", ["STUDY.toml", *options])
        case ["python" | "python3", "-m", module, *options] if module.startswith(OURS):
            check_module(module, options, monkeypatch)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def check_fastlab(name: str, options: list[str]) -> None:
    if name in ("--help", "--version"):
        return
    assert name in cli.COMMANDS
    parser = ArgumentParser(f"fastlab {name}")
    cli.COMMANDS[name].add_options(parser)
    parser.parse_args(options)


def check_launched(args: Namespace) -> None:
    assert args.training_script in ("fastlab/train.py", "fastlab.train")
    check_fastlab("train", args.training_script_args)


OURS = ("benchmarks.", "tests.")


class Parsed(Exception):
    """The options were accepted."""


def check_module(module: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = ArgumentParser.parse_args

    def parse_and_stop(self: ArgumentParser, argv: list[str] | None = None) -> None:
        parse(self, argv)
        raise Parsed

    path = ROOT / module.replace(".", "/")
    with monkeypatch.context() as patched, pytest.raises(Parsed):
        patched.setattr(ArgumentParser, "parse_args", parse_and_stop)
        patched.setattr(sys, "argv", [module, *options])
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(
    "block", scripts("python", [*PAGES, *OTHERS]), ids=lambda block: block.where
)
def test_every_python_block_compiles(block):
    compile(block.text, block.where, "exec")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_toml_block_is_a_configuration_or_a_study(page, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in scripts("toml", [page]):
        path = tmp_path / (block.file or "block.toml")
        path.write_text(block.text)
        is_study = "base" in tomllib.loads(block.text)
        assert read_study(path, []).rows if is_study else config.load(path) != config.Config()


def test_a_page_is_run_from_top_to_bottom_until_a_block_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "1. In a list:\n\n   ```sh\n   echo first > order\n   ```\n\n"
        "```python\n# module.py\nNAME = 'second'\n```\n\n"
        "```python\nimport module\n```\n\n"
        "<!-- not run: it would end the page -->\n```sh\nexit 1\n```\n\n"
        "```python\nopen('order', 'a').write(module.NAME)\n```\n\n"
        "```sh\nfalse | cat\necho third >> order\n```\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.page", str(page)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "--- page.md:26"
    assert (tmp_path / "order").read_text() == "first\nsecond"


@pytest.mark.parametrize(
    "command",
    [
        "fastlab inspect data --verfy",
        "A=1 .venv/bin/fastlab train --overide",
        "true && python -m benchmarks.loaders data --croes 1 # a comment",
        "torchrun --nproc_per_node 2 fastlab/train.py --confg x",
        "fastlab trian --config configs/demo.toml",
        "make tests",
    ],
)
def test_a_misspelt_option_is_found(command, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        for words in commands(command):
            check(words, monkeypatch)
