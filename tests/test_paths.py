"""No tracked file names a place on somebody's machine."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folders that people and machines keep their files in. /dev, /proc and /etc are alike everywhere.
_FOLDERS = "work|home|root|Users|tmp|data|scratch|mnt|media|srv|opt|usr|var|private|dev/shm"
# A path begins after a quote, a space, a tag, "=" or ":", after an escaped newline (in JSON) or
# "file://"; not within a relative path, a URL, the closing tag "</p>" or base64.
_MACHINE_PATH = re.compile(
    rf"(?:(?<=\\n)|(?<=file://)|(?<![\w.+~/<}}-]))/(?:{_FOLDERS})/[\w.+@%~/-]*"
)
ALLOWED = {
    "/usr/bin/env": "the first line of a script",
    "/var/lib/apt/lists/": "a folder of the Docker image",
    "/data/": "a pattern of .gitignore, and a made-up path that tests markup",
    "/data/set.zip": "the address of a file on a test's own server",
    "/home/some/fastlab/train.py": "a made-up place in a trace",
    "/tmp/fastlab-was-here": "what an attack by an archive would write",
}


def machine_paths(text: str) -> Iterator[str]:
    for match in _MACHINE_PATH.finditer(text):
        if match[0] not in ALLOWED:
            yield match[0]


def test_no_tracked_file_names_a_path_of_a_machine():
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    texts = {
        path: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.exists()
    }
    assert len(texts) > 100
    assert not [(str(path), name) for path, text in texts.items() for name in machine_paths(text)]


@pytest.mark.parametrize("folder", ["home/me", "work/x", "root", "tmp/a", "Users/me", "dev/shm"])
@pytest.mark.parametrize(
    "text",
    [
        "{path}",
        '"command": "python -m benchmarks.loaders {path} --rounds 5"',
        "path = '{path}'",
        "--out={path}",
        "PATH=bin:{path}",
        "<td>{path}</td>",
        "see (`{path}`)",
        r'"Traceback:\n{path}, line 3"',
        "file://{path}",
    ],
)
def test_a_planted_path_is_found(folder, text):
    path = f"/{folder}/tiny-imagenet"
    assert list(machine_paths(text.format(path=path))) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "data/tmp/x, ../home/x, ./srv/x, ~/data/x, images/s",
        "https://example.org/data/tiny.zip",
        "f'{address}/data/plugin'",
        "#!/usr/bin/env bash",
        "/dev/full, /proc/cpuinfo, /etc/passwd",
        "data:image/png;base64,iVBO/tmp/b+/home/d==",
        "</srv/>",
    ],
)
def test_other_text_is_not_taken_for_a_path(text):
    assert list(machine_paths(text)) == []
