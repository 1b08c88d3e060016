"""What lies behind a URL, copied to this machine for a conversion."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from fastlab.console import UserError, printable
from fastlab.dataset.manifest import describe_file
from fastlab.dataset.remote import Remote, RemoteFile
from fastlab.dataset.tar_members import member_path

_THREADS = 8  # files at a time
_TIMES = 1 << 31  # seconds: the times that every file system can store


def fetch(url: str, scratch: Path) -> Path:
    """Copy the file or folder at `url` into the directory `scratch`; return its path there.

    The time of the last change of each file becomes one that follows from its content, so that it
    is the same whenever it is fetched. Raises `UserError` where a file does not arrive whole after
    several tries, or the disk has no room for all.
    """
    remote = Remote(url)
    files = remote.files()
    _check_room(files, scratch, url)
    top = scratch / remote.url.rpartition("/")[2]
    if list(files) == [""]:
        targets = {"": top}
    else:
        targets = {path: top / _local(path, url) for path in files}
    for folder in {target.parent for target in targets.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [
            pool.submit(_fetch, remote, path, target, files[path].size)
            for path, target in targets.items()
        ]
        try:
            for job in tqdm(jobs, unit="file", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return top


def _fetch(remote: Remote, path: str, target: Path, size: int | None) -> None:
    remote.fetch(path, target, size)
    changed = int(describe_file(target).xxh128, 16) % _TIMES
    os.utime(target, (changed, changed))


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
