"""The trainings of a study on this machine: several side by side, resumable after any end."""

import time
from dataclasses import dataclass, field
from typing import Self

from fastlab.console import UserError
from fastlab.study.child import Child, conclude, is_disk_full, places
from fastlab.study.folder import StudyDir, look
from fastlab.study.screen import Screen, counted
from fastlab.study.spec import Task
from fastlab.study.workers import Worker


@dataclass
class Pool:
    """Trainings side by side, and a place (a GPU, or a share of the cores) for each. A place has a
    process, which trains run after run, until the `with` block of the pool ends."""

    study: StudyDir
    lock: int
    """Descriptor of the study's lock, which each training inherits."""
    jobs: int
    running: dict[int, Child] = field(default_factory=dict)
    """By place."""
    stuck: Task | None = None
    """A run that met a full disk."""

    def __post_init__(self) -> None:
        self.workers = [Worker(self.study, self.lock, place) for place in places(self.jobs)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for place, worker in enumerate(self.workers):
            if place not in self.running:
                worker.close()

    def run(self, tasks: list[Task], stop: list[int], screen: Screen) -> None:
        """Train all of `tasks`; after a signal, wait for those that have begun to save and end.
        Raises `UserError` where the disk is full, when those that have begun have ended."""
        waiting, passed_on = list(tasks), 0
        while self.running or (waiting and not (stop or self.stuck)):
            while waiting and not (stop or self.stuck) and len(self.running) < self.jobs:
                self._start(waiting, screen)
            if len(stop) > passed_on:
                passed_on = len(stop)
                self._stop(at_once=passed_on > 2, screen=screen)
            self._collect(screen)
            screen.show([child.task for child in self.running.values()])
            time.sleep(0.1)
        if self.stuck and not stop:
            raise UserError(
                f"{self.study.path}: the disk was full for {self.stuck.name}; make room, then the "
                f"same command resumes the study"
            )

    def _start(self, waiting: list[Task], screen: Screen) -> None:
        """Begin one of the next seed's runs: one that can use what its place has compiled, or the
        first. So no row waits for another row's second seed."""
        place = next(i for i in range(self.jobs) if i not in self.running)
        worker = self.workers[place]
        same_seed = (task for task in waiting if task.seed == waiting[0].seed)
        task = next(filter(worker.likes, same_seed), waiting[0])
        waiting.remove(task)
        try:
            child = worker.begin(task)
        except UserError as error:
            self.study.write_record(task, "failed", str(error))
            screen.ended(task, look(self.study, task))
            return
        self.running[place] = child
        screen.began(task, child.gpu)

    def _stop(self, at_once: bool, screen: Screen) -> None:
        trainings = counted(len(self.running), "training")
        screen.say(f"stopping {trainings}{'' if at_once else '; checkpoints are saved first'}")
        for child in self.running.values():
            child.process.kill() if at_once else child.process.terminate()

    def _collect(self, screen: Screen) -> None:
        for child in self.running.values():
            child.side_by_side = max(child.side_by_side, len(self.running))
        for place, child in list(self.running.items()):
            if child.poll() is not None:
                del self.running[place]
                state = conclude(self.study, child)
                screen.ended(child.task, state)
                if is_disk_full(state.reason):
                    self.stuck = child.task
