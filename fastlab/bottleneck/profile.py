"""Where the time of Python code goes: reading, decoding, collating, waiting, or the rest.

A deterministic profiler follows every call of this thread. What a call takes itself counts for the
stage that its function's name says, or else for its caller's stage: a `time.sleep` in the `read` of
a file object is reading. Python does not report the calls of functions that Cython compiled, such
as `simplejpeg.decode_jpeg`; they count for their caller.
"""

import sys
import time
from collections import defaultdict
from functools import cache
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, Self

from fastlab.console import public_path

SAMPLER, READ, DECODE, REST = "sampler", "read", "decode", "transform"
COLLATE, PIN, WAIT = "collate", "pin memory", "other threads and processes"

_BY_NAME: dict[str, str] = {
    name: stage
    for stage, names in {
        SAMPLER: "_next_index",  # of a DataLoader's iterator
        READ: "open read read1 readinto readinto1 readline readlines readall read_bytes read_text "
        "read_file recv recv_into pread preadv fromfile stat urlopen get_object",
        DECODE: "decode_example decode_image decode_jpeg decode_png imdecode imread decompress",
        COLLATE: "collate collate_fn default_collate",
        PIN: "pin_memory",
        WAIT: "acquire select poll wait",
    }.items()
    for name in names.split()
}
_BY_MODULE: dict[str, str] = {
    module: stage
    for stage, modules in {
        READ: "h5py zarr lmdb fsspec s3fs botocore urllib3 requests socket ssl sqlite3",
        DECODE: "PIL.ImageFile torchvision.io turbojpeg imageio skimage.io torchcodec torchaudio "
        "soundfile librosa tifffile zlib gzip lzma bz2 json pandas.io torch.serialization",
    }.items()
    for module in modules.split()
}


class Call(NamedTuple):
    """A function that is running."""

    stage: str
    builtin: str
    """The name of a C function; empty for a Python function."""
    code: CodeType | None
    """The Python function, or the one that called the C function."""


class Profile:
    """A context manager that profiles the code in its block."""

    def __init__(self) -> None:
        self._measured: defaultdict[Call, float] = defaultdict(float)
        self._events: defaultdict[Call, int] = defaultdict(int)
        self._stack = [Call(REST, "", None)]
        self._last = 0.0

    def __enter__(self) -> Self:
        self._last = time.perf_counter()
        sys.setprofile(self._follow)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.setprofile(None)

    def add(self, other: "Profile") -> None:
        """Add the calls of another profile to this one's."""
        for call, seconds in other._measured.items():
            self._measured[call] += seconds
            self._events[call] += other._events[call]

    def seconds(self, plain: float) -> dict[Call, float]:
        """What each function took itself. All that was profiled takes `plain` seconds without a
        profiler: what it took beyond that is shared by all calls and returns."""
        excess = max(0.0, sum(self._measured.values()) - plain) / sum(self._events.values())
        return {
            call: max(0.0, seconds - excess * self._events[call])
            for call, seconds in self._measured.items()
        }

    def _follow(self, frame: FrameType, event: str, arg: Any) -> None:
        """Called by Python at each call and return. Its own time counts for nothing."""
        self._measured[self._stack[-1]] += time.perf_counter() - self._last
        self._events[self._stack[-1]] += 1
        if event == "call":
            name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
            self._enter(_stage_of(module, name), "", frame.f_code)
        elif event == "c_call":
            self._enter(_stage_of(arg.__module__ or "", arg.__name__), arg.__name__, frame.f_code)
        elif len(self._stack) > 1:  # the block itself returns from calls that began before it
            self._stack.pop()
        self._last = time.perf_counter()

    def _enter(self, stage: str | None, builtin: str, code: CodeType) -> None:
        around = self._stack[-1].stage
        if stage is None or (stage == WAIT and around != REST):  # to wait for a read is to read
            stage = around
        self._stack.append(Call(stage, builtin, code))


def shares(seconds: dict[Call, float]) -> dict[str, float]:
    """The share of each stage, the largest first."""
    total = sum(seconds.values())
    stages: defaultdict[str, float] = defaultdict(float)
    for call, took in seconds.items():
        stages[call.stage] += took / total
    return dict(sorted(stages.items(), key=lambda item: -item[1]))


def costliest(seconds: dict[Call, float], stage: str) -> str:
    """The function that takes most of a stage itself, with its place in the code."""
    calls = [call for call in seconds if call.stage == stage]
    call = max(calls, key=lambda call: seconds[call])
    if call.code is None:
        return call.builtin
    file, line = public_path(call.code.co_filename), call.code.co_firstlineno
    caller = f"{call.code.co_qualname} ({file}:{line})"
    return f"{call.builtin} in {caller}" if call.builtin else caller


@cache
def _stage_of(module: str, name: str) -> str | None:
    """The stage of a function by its module and name; None: that of its caller."""
    if (module, name) == ("PIL.Image", "open"):
        return DECODE
    if name in _BY_NAME:
        return _BY_NAME[name]
    parents = module.split(".")
    prefixes = (".".join(parents[:count]) for count in range(1, len(parents) + 1))
    return next((_BY_MODULE[each] for each in prefixes if each in _BY_MODULE), None)
