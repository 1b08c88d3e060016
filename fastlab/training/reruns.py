"""What becomes of an existing run: it is overwritten, or resumed under changed settings."""

import json
import shutil
from dataclasses import replace
from typing import Any

from fastlab import config as configs
from fastlab.config import Config
from fastlab.files import write_atomically
from fastlab.runs import RunDir


def clear(run: RunDir) -> None:
    """Remove the files of a run, but for those that `RunDir.create` replaces. Until it does, the
    directory is a run without a checkpoint, which can be resumed or overwritten. Raises `UserError`
    where a file cannot be removed."""
    made = (run.checkpoints, run.tensorboard, run.wandb, run.mlruns, run.traces, run.trackers)
    made += (run.metrics, run.summary, run.predictions, run.errors, run.initial)
    with run.writing():
        for path in made:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def change_config(run: RunDir, config: Config, until: str) -> dict[str, Any]:
    """Rewrite the configuration of a resumed run. A comment in it keeps each replaced value, and
    `until` when it was in force. Returns the replaced values by ``section.key``. Raises `UserError`
    where the file cannot be written.

    [profile] stays as it was, since it concerns a process and not the run.
    """
    before = run.load_config()
    config = replace(config, profile=before.profile)
    replaced = configs.differences(before, config)
    if replaced:
        lines = run.config.read_text(encoding="utf-8").splitlines()
        comments = [line for line in lines if line.startswith("#")]
        comments += [f"# until {until}: {key} = {json.dumps(v)}" for key, v in replaced.items()]
        with run.writing():
            write_atomically(run.config, "\n".join([*comments, "", configs.dump(config)]))
    return replaced
