"""A loader that is slow in one stage, by a known cost: the stage is named."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastlab.bottleneck import command
from fastlab.bottleneck.profile import DECODE, READ, REST, WAIT, Profile, shares
from fastlab.bottleneck.stages import transfer_stage


def costliest(found: dict) -> dict:
    return found["stages"][0]


def test_slow_starts_of_workers_are_named_with_what_ends_them(look):
    found = look("""
        def prepare(worker):
            time.sleep(0.2)

        def make():
            return DataLoader(ONES, 20, num_workers=1, worker_init_fn=prepare)
        """)
    assert costliest(found)["name"] == "worker start"
    assert costliest(found)["ms"] / 1000 >= 0.2 / 20  # an epoch has 20 batches
    assert any("persistent_workers" in hint for hint in found["advice"])


def test_reads_of_a_slow_file_are_named(look):
    found = look("""
        import io

        class Remote(io.RawIOBase):
            def readable(self):
                return True

            def readinto(self, buffer):
                time.sleep(0.01)
                return 0

        class Files(Dataset):
            def __len__(self):
                return 100

            def __getitem__(self, index):
                return torch.tensor(len(io.BufferedReader(Remote()).read(10)))

        def make():
            return DataLoader(Files(), 2)
        """)
    assert costliest(found)["name"] == READ
    assert costliest(found)["ms"] >= 15
    assert "Reading costs most" in found["verdict"]["line"]


def test_decoding_large_jpegs_is_named(look, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg", quality=95)
    found = look(f"""
        from PIL import Image

        class Photos(Dataset):
            def __len__(self):
                return 100

            def __getitem__(self, index):
                with Image.open({str(tmp_path / "large.jpg")!r}) as image:
                    return torch.tensor(image.convert("RGB").getpixel((0, 0)))

        def make():
            return DataLoader(Photos(), 2)
        """)
    assert costliest(found)["name"] == DECODE
    assert "decode in ImageFile.load" in costliest(found)["where"]


def test_a_slow_transform_is_named_with_its_function(look):
    found = look("""
        def jitter(value):
            time.sleep(0.01)
            return value

        class Jittered(Dataset):
            def __len__(self):
                return 100

            def __getitem__(self, index):
                return jitter(torch.tensor(index))

        def make():
            return DataLoader(Jittered(), 2, num_workers=1)
        """)
    assert costliest(found)["name"] == REST
    assert costliest(found)["ms"] >= 15
    assert "jitter (script" in found["verdict"]["line"]


def test_a_slow_collate_function_is_named_whatever_its_name(look):
    found = look("""
        def pad(samples):
            time.sleep(0.02)
            return torch.stack([sample for (sample,) in samples])

        def make():
            return DataLoader(ONES, 4, collate_fn=pad)
        """)
    assert costliest(found)["name"] == "collate"
    assert costliest(found)["ms"] >= 15


def test_a_slow_sampler_is_named(look):
    found = look("""
        def slowly():
            for index in range(400):
                time.sleep(0.01)
                yield index

        def make():
            return DataLoader(ONES, 2, sampler=slowly())
        """)
    assert costliest(found)["name"] == "sampler"


def test_batches_that_are_slow_to_pickle_are_named_as_handed_over(look):
    found = look("""
        class Texts(Dataset):
            def __init__(self):
                self.texts = [str(number) for number in range(20_000)]

            def __len__(self):
                return 100

            def __getitem__(self, index):
                return self.texts

        def keep(batch):
            return batch

        def make():
            return DataLoader(Texts(), None, num_workers=1, collate_fn=keep)
        """)
    assert costliest(found)["name"] == "hand-over"
    assert found["samples"] is None and "batches/s" in found["verdict"]["line"]


def test_a_loader_that_waits_for_threads_is_no_transform(look):
    found = look("""
        import queue, threading

        def make():
            ready = queue.Queue(2)

            def fill():
                for _ in range(1000):
                    time.sleep(0.01)
                    ready.put(torch.ones(2, 3))

            threading.Thread(target=fill, daemon=True).start()
            while True:
                yield ready.get()
        """)
    assert costliest(found)["name"] == WAIT
    assert found["workers"] is None and found["length"] is None


def test_a_dataset_that_needs_its_workers_is_measured_without_stages(look):
    found = look("""
        class Sharded(Dataset):
            def __len__(self):
                return 100

            def __getitem__(self, index):
                return torch.utils.data.get_worker_info().id

        def make():
            return DataLoader(Sharded(), 2, num_workers=1)
        """)
    assert "AttributeError" in found["why_no_stages"]
    assert len(found["rounds"]["alone"]) >= 3


def test_the_loader_of_accelerate_is_profiled_like_its_own(look):
    found = look("""
        from accelerate import Accelerator

        def jitter(samples):
            time.sleep(0.02)
            return torch.stack([sample for (sample,) in samples])

        def make():
            loader = DataLoader(ONES, 4, collate_fn=jitter, num_workers=1)
            return Accelerator(cpu=True).prepare(loader)
        """)
    assert costliest(found)["name"] == "collate"
    assert costliest(found)["where"].startswith("sleep in jitter")


def test_a_slow_copy_to_the_device_is_named(look, monkeypatch):
    copy = torch.Tensor.to

    def slow_copy(tensor, *args, **options):
        time.sleep(0.02)
        return copy(tensor, *args, **options)

    monkeypatch.setattr(command, "accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "to", slow_copy)
    found = look("""
        def make():
            return DataLoader(ONES, 4)

        def step(batch):
            batch[0].to("meta")
        """)
    assert found["transfer"]["ms"] >= 20
    assert "Copying a batch to meta takes" in found["verdict"]["line"]


def test_batches_on_the_device_need_no_transfer():
    batch = {"images": torch.ones(2, device="meta")}
    assert transfer_stage(batch, torch.device("meta")) is None
    assert transfer_stage({"images": torch.ones(2)}, None) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_to_a_gpu_takes_as_long_as_its_events_say():
    batch = [torch.ones(64 << 20)]  # 256 MB
    device = torch.device("cuda")
    measured = transfer_stage(batch, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    batch[0].to(device)
    end.record()
    end.synchronize()
    assert 0.5 < measured.ms / start.elapsed_time(end) < 2


def profiled(work) -> dict[str, float]:
    profile = Profile()
    started = time.perf_counter()
    with profile:
        work()
    return shares(profile.seconds(time.perf_counter() - started))


def test_decoding_within_a_read_is_decoding():
    def read():
        time.sleep(0.02)
        return imdecode()

    def imdecode():
        time.sleep(0.06)

    found = profiled(read)
    assert 0.6 < found[DECODE] < 0.9 and 0.1 < found[READ] < 0.4


def test_what_fails_under_the_profiler_does_not_disturb_it():
    def decompress():
        raise ValueError

    def work():
        for _ in range(3):
            try:
                decompress()
            except ValueError:
                time.sleep(0.01)

    found = profiled(work)
    assert found[REST] > 0.9


def test_a_generator_counts_for_whoever_takes_from_it():
    def items():
        while True:
            yield io.BytesIO(b"x" * 10).read()

    def work():
        stream = items()
        for _ in range(5):
            next(stream)
            time.sleep(0.01)

    assert profiled(work)[REST] > 0.9
