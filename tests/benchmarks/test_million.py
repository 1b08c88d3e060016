import tarfile
import tracemalloc

import numpy as np

from benchmarks import million
from fastlab.dataset.archives import open_tree
from fastlab.dataset.originals import read_originals


def listed(folder, images: int) -> tuple[int, int]:
    """Bytes of Python's memory that the listing of a tar of `images` keeps, and its peak."""
    path = folder / f"{images}.tar"
    million.write_tar(path, images)
    tracemalloc.start()
    try:
        tree = open_tree(path, folder)
        originals = read_originals(tree, str(path))
        assert len(originals.splits["train"].paths) == images
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_memory_grows_by_a_few_hundred_bytes_for_each_image(tmp_path):
    few, many = listed(tmp_path, 5_000), listed(tmp_path, 20_000)
    kept, peak = np.subtract(many, few) / 15_000
    assert kept < 400 and peak < 500


def test_the_tar_of_the_benchmark_is_one_that_tarfile_reads(tmp_path):
    million.write_tar(tmp_path / "few.tar", 2_000)
    with tarfile.open(tmp_path / "few.tar") as archive:
        names = archive.getnames()
    assert len(set(names)) == 3_000 and names[0] == "train/class0000/00000000.jpg"
    assert len({name.split("/")[1] for name in names[:2_000]}) == 1_000


def test_each_case_is_measured(tmp_path, capsys):
    assert million.main(["--images", "2000", "--scratch", str(tmp_path / "scratch")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for case in ("listing", "array", "tar, undecoded"):
        assert sum(line.startswith(f"| {case} |") for line in lines) == 2
    assert not (tmp_path / "scratch").exists()
