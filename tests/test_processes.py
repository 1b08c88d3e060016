"""How a process of a training starts: how its threads wait, and whether its launcher is alive."""

import os
import socket
import subprocess
import sys

import pytest

from tests.trainings import ROOT, command

COMMAND, SCRIPT = ["-m", "fastlab", "train"], ["fastlab/train.py"]
BRIEF = "2 threads, which spin briefly"
CHOSEN = "2 threads, which wait as the environment says"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "chosen", "expected", "reported"),
    [
        (COMMAND, {}, "GOMP_SPINCOUNT = '5000'", BRIEF),
        (SCRIPT, {}, "GOMP_SPINCOUNT = '5000'", BRIEF),
        (SCRIPT, {"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'", CHOSEN),
    ],
)
def test_threads_spin_briefly_unless_the_environment_says_otherwise(
    start, chosen, expected, reported, synth_dataset, tmp_path
):
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {
        "OMP_DISPLAY_ENV": "verbose",
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *start, *command(synth_dataset, tmp_path / "run", "train.epochs=1")],
        env={**environment, "PYTHONPATH": str(ROOT), **chosen},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stderr
    assert f"computing with {reported}" in done.stdout


@pytest.mark.parametrize("answers", [True, False])
def test_a_process_ends_at_once_unless_its_launcher_answers(answers):
    with socket.create_server(("127.0.0.1", 0)) as store:
        port = store.getsockname()[1]
        if not answers:
            store.close()
        launched = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        script = "from fastlab.processes import die_with_launcher; die_with_launcher()"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **launched},
            capture_output=True,
            text=True,
        )
    line = f"fastlab: the launcher at 127.0.0.1:{port} does not answer\n"
    assert (done.returncode, done.stderr) == ((0, "") if answers else (1, line))
