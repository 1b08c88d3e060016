"""What lies behind a URL, copied to this machine for a conversion."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from fastlab.console import UserError, printable
from fastlab.dataset.manifest import describe_file, new_hash
from fastlab.dataset.remote import Remote, RemoteFile
from fastlab.dataset.tar_members import member_path

_THREADS = 8  # files at a time
_TIMES = 1 << 31  # seconds: the times that every file system can store


def list_remote(url: str) -> str:
    """The `Originals.listing` of what lies at `url`. Raises `UserError` where it cannot be read."""
    return _hash(Remote(url).files())


def fetch(url: str, scratch: Path) -> tuple[Path, str]:
    """Copy the file or folder at `url` into the directory `scratch`; return its path there, and its
    `listing`.

    The time of the last change of each file becomes one that follows from its content, so that it
    is the same whenever it is fetched. Raises `UserError` where a file does not arrive whole after
    several tries, or the disk has no room for all.
    """
    remote = Remote(url)
    files = remote.files()
    _check_room(files, scratch, url)
    top = scratch / Path(urlsplit(url).path or urlsplit(url).netloc).name
    targets = {path: top / _local(path, url) if path else top for path in files}
    for folder in {target.parent for target in targets.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.size or 0 for file in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        _fetch_all(remote, files, targets, bar)
    return top, _hash(files)


def _hash(files: dict[str, RemoteFile]) -> str:
    if not all(file.version for file in files.values()):
        return ""
    return new_hash(json.dumps(files).encode()).hexdigest()


def _fetch_all(
    remote: Remote, files: dict[str, RemoteFile], targets: dict[str, Path], bar: tqdm
) -> None:
    stopped = threading.Event()

    def arrived(size: int) -> None:
        if stopped.is_set():
            raise UserError(f"{remote.url}: interrupted")
        bar.update(size)

    def fetch_one(path: str) -> None:
        remote.fetch(path, targets[path], files[path].size, arrived)
        changed = int(describe_file(targets[path]).xxh128, 16) % _TIMES
        os.utime(targets[path], (changed, changed))

    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(fetch_one, path) for path in files]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:  # after a failure or Ctrl-C, the other files are not waited for
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _local(path: str, url: str) -> str:
    """The relative path of a copy. Raises `UserError` for one that leads out of the folder."""
    try:
        return member_path(path)
    except ValueError as error:
        raise UserError(f"{url}: {printable(str(error))}; rename it") from None


def _check_room(files: dict[str, RemoteFile], scratch: Path, url: str) -> None:
    needed, free = sum(file.size or 0 for file in files.values()), shutil.disk_usage(scratch).free
    if needed > free:
        raise UserError(
            f"{url}: {needed / 1e9:.1f} GB are fetched beside the dataset, whose disk has "
            f"{free / 1e9:.1f} GB free; make room, or choose another disk"
        )
