"""A SLURM of two nodes on this machine, with its own munge, for the length of a test module."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

MISSING = "" if shutil.which("slurmctld") and shutil.which("munged") else "SLURM is not installed"
if not MISSING and os.getuid():
    MISSING = "SLURM's daemons start jobs as root alone"

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,default_queue_depth=50
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=20
ReturnToService=0
NodeName=a NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO
"""


def call(*command: str) -> str:
    """What a command of SLURM prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_until(happened: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with_port = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [made.getsockname()[1] for made in with_port]
    for made in with_port:
        made.close()
    return ports


@contextmanager
def running(folder: Path) -> Generator[None]:
    """Start munge, the controller and the nodes ``a`` and ``b``, which SLURM_CONF then names; end
    them with the block. `folder` is their own."""
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(64))
    (folder / "key").chmod(0o400)
    host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(host=host, ports=ports, folder=folder))
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--key-file={folder}/key", f"--pid-file={folder}/munge.pid"]
    munge += [f"--seed-file={folder}/seed", f"--log-file={folder}/munge.log"]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(config)
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", n] for n in "ab")):
            with (folder / f"{command[0]}{len(daemons)}.out").open("wb") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            if command is munge:
                wait_until((folder / "munge.socket").exists)
        wait_until(lambda: call_or_nothing("sinfo", "-h", "-o", "%T %D") == "idle 2\n")
        yield
    finally:
        call_or_nothing("scancel", "--me", "--signal=KILL", "--full")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def call_or_nothing(*command: str) -> str:
    """As `call`; nothing where the controller does not answer yet."""
    return subprocess.run(command, capture_output=True, text=True).stdout
