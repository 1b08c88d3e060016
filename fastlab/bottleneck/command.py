"""`fastlab bottleneck`: find, measure, judge, print."""

import json
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from statistics import median

from fastlab.bottleneck.engines import Engines, choose_sample, measure_engines
from fastlab.bottleneck.feed import Feed, processes_ended
from fastlab.bottleneck.findings import Findings
from fastlab.bottleneck.report import as_json, as_text
from fastlab.bottleneck.rounds import measure
from fastlab.bottleneck.stages import (
    Stages,
    accelerator,
    first_array,
    measure_stages,
    start_stage,
    transfer_stage,
)
from fastlab.bottleneck.verdict import judge
from fastlab.console import UserError
from fastlab.machine import cores, environment
from fastlab.processes import interrupted_by_signals
from fastlab.usercode import find

# Shares of the time that the command may take.
_ROUNDS, _STAGES, _ENGINES = 0.6, 0.15, 0.15


def run(args: Namespace) -> None:
    """Raises `UserError` where the loader or the step cannot be found, raises, or hangs."""
    with redirect_stdout(sys.stderr), interrupted_by_signals(), processes_ended():
        findings = investigate(args.loader, args.step, args.timeout, args.seconds)
    print(json.dumps(as_json(findings), indent=1) if args.json else as_text(findings))


def investigate(target: str, step_target: str | None, limit: float, seconds: float) -> Findings:
    """Measure the loader `target`, with the step `step_target` if there is one, for about `seconds`
    in all. A batch or step may take `limit` seconds."""
    found = find(target, limit)
    step = find(step_target, limit) if step_target else None
    if not (step is None or callable(step)):
        kind = type(step).__name__
        raise UserError(f"--step {step_target}: is an object of {kind}; name a function")
    feed = Feed(found, target.rpartition(":")[2], limit)
    try:
        rounds = measure(feed, step, limit, seconds * _ROUNDS)
    finally:
        feed.close()
    alone, device = median(rounds.alone), accelerator()
    stages, why_no_stages = _stages(feed, alone, limit, seconds * _STAGES)
    engines, why_no_engines = _engines(feed, seconds * _ENGINES)
    start = stages.start.wall / 1000 if feed.starts_apart() else 0.0
    images = first_array(feed.held)
    return Findings(
        target=target,
        samples=None if images is None else len(images),
        length=feed.length,
        workers=None if feed.own is None else feed.workers,
        cores=cores(),
        rounds=rounds,
        start=start,
        verdict=judge(rounds, start),
        stages=stages,
        why_no_stages=why_no_stages,
        device=device.type if device else None,
        transfer=transfer_stage(feed.held, device),
        engines=engines,
        why_no_engines=why_no_engines,
        environment=environment(processes=1),
    )


def _stages(feed: Feed, alone: float, limit: float, seconds: float) -> tuple[Stages, str]:
    """The stages; where the loader works in its workers alone, just its start, and why."""
    try:
        return measure_stages(feed, alone, limit, seconds), ""
    except UserError as error:
        return Stages(start_stage(feed, alone, alone), []), str(error)


def _engines(feed: Feed, seconds: float) -> tuple[Engines | None, str]:
    """What fastlab's engines give; or None, and why the data cannot be converted."""
    try:
        sample = choose_sample(feed.loader, feed.held)
        return measure_engines(sample, len(first_array(feed.held)), seconds), ""
    except UserError as error:
        return None, str(error)
