"""Trains run after run in one process, which imports, uploads images and compiles once.

`fastlab.study.workers.Worker` starts it. Each line on standard input is a JSON list: the log that
the next training prints to, and the training's arguments. After a training that finishes, one byte
is written to the descriptor that the only argument names. After any other the process ends with its
exit status: a crash, an exhausted memory or a signal must leave no trace in the next training.
"""

import gc
import json
import os
import sys
import time

from fastlab import processes


def main() -> int:
    reports = int(sys.argv[1])
    os.set_inheritable(reports, False)
    processes.spin_briefly()  # before torch is imported
    import torch

    from fastlab.train import main as train
    from pipelines import resident

    resident.keep_uploaded()
    for number, line in enumerate(sys.stdin):
        log, arguments = json.loads(line)
        _print_to(log)
        if number:
            processes.STARTED = time.perf_counter()
        status = train(arguments)
        sys.stdout.flush()
        if status:
            return status
        os.write(reports, b"\n")
        gc.collect()  # a training's parts refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def _print_to(log: str) -> None:
    """Let whatever this process prints go to the end of the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


if __name__ == "__main__":
    raise SystemExit(main())
