"""Steps under way: started in sessions of their own, stopped at their limits, and reported."""

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_steps import BESIDE, LOGS, RESULTS, Step

_GRACE = 10.0  # seconds that a step has to save its work
_WRITTEN_ANEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
# Its arguments are the file for the exit status, as $0, and the command.
_SCRIPT = 'trap : INT; "$@"; echo $? >"$0"'
_KILLED = "failed (killed)"
"""The outcome of a step whose shell has ended without writing an exit status."""
_SHOWN = 12  # last lines of each step's log that a stage prints


def attempt(steps: list[Step], deadline: float, stage: str, wait: bool = False) -> list[str]:
    """Run `steps` until `deadline` (of the monotonic clock); with `wait`, wait for the steps that
    run beside. Returns the outcomes of the steps that ended."""
    outcomes = []
    for step in steps:
        running = Running.start(step)
        if not step.beside:
            outcomes.append(running.finish(stage, deadline))
    if wait:
        outcomes += [running.finish(stage, deadline) for running in Running.all_beside()]
    return outcomes


@dataclass(frozen=True)
class Running:
    """A step under way, in a session of its own: it outlives the command of its stage."""

    name: str
    process: int
    """The number of the shell that writes the exit status, and of its process group."""
    started: float
    seconds: float

    @classmethod
    def start(cls, step: Step) -> "Running":
        status = LOGS / f"{step.name}.status"
        status.unlink(missing_ok=True)
        files = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, LOGS / f"{step.name}.log", _WRITTEN_ANEW, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        shell = os.posix_spawnp(
            "bash",
            ["bash", "-c", _SCRIPT, str(status), *step.command],
            os.environ,
            setsid=True,
            setsigdef=[signal.SIGINT],  # a shell starts its background commands with it ignored
            file_actions=files,
        )
        running = cls(step.name, shell, time.monotonic(), step.seconds)
        if step.beside:
            BESIDE.mkdir(exist_ok=True)
            (BESIDE / f"{step.name}.json").write_text(json.dumps(asdict(running)))
        return running

    @classmethod
    def all_beside(cls) -> list["Running"]:
        """The steps that run beside; the next call does not return them again."""
        steps = []
        for path in sorted(BESIDE.glob("*.json")):
            steps.append(cls(**json.loads(path.read_text())))
            path.unlink()
        return steps

    def finish(self, stage: str, deadline: float) -> str:
        """Wait for the step, stop it at its limit or at `deadline`, and report it on the console
        and in suite.jsonl. Returns its outcome."""
        outcome = ""
        try:
            outcome = self._ended_by(min(deadline, self.started + self.seconds))
        finally:
            if outcome in ("", _KILLED):  # Ctrl-C does not reach the step's own session
                self._stop()
        outcome = outcome or "cut off"
        seconds = time.monotonic() - self.started
        lines = (LOGS / f"{self.name}.log").read_text("utf-8", errors="replace").splitlines()
        print(f"== {stage}/{self.name}: {outcome}, {seconds:.1f} s")
        print("\n".join(lines[-_SHOWN:] if outcome == "done" else lines[-3 * _SHOWN :]), flush=True)
        record = {
            "stage": stage,
            "step": self.name,
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "last_line": lines[-1] if lines and outcome != "done" else "",
        }
        with (RESULTS / "suite.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return outcome

    def _status(self) -> int | None:
        path = LOGS / f"{self.name}.status"
        text = path.read_text() if path.exists() else ""
        return int(text) if text.endswith("\n") else None

    def _ended_by(self, deadline: float) -> str:
        """The outcome of the step; empty where it has not ended at `deadline`."""
        gone = False
        while (status := self._status()) is None:
            if gone:
                return _KILLED
            gone = self._shell_is_gone()  # it may have written the status just before
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.1)
        return "done" if status == 0 else f"failed ({status})"

    def _shell_is_gone(self) -> bool:
        with suppress(ChildProcessError):  # an earlier command started it, or it was waited for
            return os.waitpid(self.process, os.WNOHANG)[0] == self.process
        return not Path(f"/proc/{self.process}").exists()

    def _stop(self) -> None:
        """Send SIGINT, as Ctrl-C does: trainings save a checkpoint, pytest reports its results.
        After a grace period, send SIGKILL."""
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGINT)
        if self._ended_by(time.monotonic() + _GRACE) in ("", _KILLED):
            with suppress(ProcessLookupError):
                os.killpg(self.process, signal.SIGKILL)
