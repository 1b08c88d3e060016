"""All that `fastlab bottleneck` found out."""

from dataclasses import dataclass
from typing import Any

from fastlab.bottleneck.engines import Engines
from fastlab.bottleneck.rounds import Rounds
from fastlab.bottleneck.stages import Stage, Stages
from fastlab.bottleneck.verdict import Verdict


@dataclass(frozen=True)
class Findings:
    target: str
    """The loader, as it was named."""
    samples: int | None
    """Samples in a batch; None: it holds no array."""
    length: int | None
    """Batches of an epoch; None: not known."""
    workers: int | None
    """Of a DataLoader; None for other iterables."""
    cores: int
    rounds: Rounds
    start: float
    """Seconds that the beginning of an epoch adds to each batch, beside the rounds."""
    verdict: Verdict
    stages: Stages
    why_no_stages: str
    """Empty where the stages were measured."""
    device: str | None
    """"cuda", say; None: there is no accelerator."""
    transfer: Stage | None
    engines: Engines | None
    why_no_engines: str
    """Empty where the engines were measured."""
    environment: dict[str, Any]

    def costs(self) -> list[Stage]:
        """The loader's stages that cost something, the costliest first."""
        stages = [stage for stage in (self.stages.start, *self.stages.others) if stage.wall > 0]
        return sorted(stages, key=lambda stage: -stage.wall)

    def share(self, stage: Stage) -> float:
        """The share that a stage has of the loader's time."""
        return stage.wall / sum(each.wall for each in self.costs())
