"""Which share of each module the tests ran, and why not the rest.

    coverage run -m pytest; coverage combine; python -m tests.covered

Exits with status 1 where less than `ENOUGH` of a module's lines ran and `uncovered.toml` gives no
reason, or where it gives a reason for a module that does not exist.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ENOUGH = 75  # per cent


def main() -> int:
    reasons = tomllib.loads(Path(__file__).with_name("uncovered.toml").read_text("utf-8"))
    table, complaints = review(_measured(), reasons)
    print(table, *complaints, sep="\n")
    return 1 if complaints else 0


def _measured() -> dict[str, float]:
    """The share of the lines that ran, per cent, by the path of the module."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(out)]
        subprocess.run(command, check=True)
        files = json.loads(out.read_text())["files"]
    return {
        path: record["summary"]["percent_covered"]
        for path, record in files.items()
        if record["summary"]["num_statements"]
    }


def review(covered: dict[str, float], reasons: dict[str, str]) -> tuple[str, list[str]]:
    """Returns the table of shares and reasons, and what is wrong with the reasons."""
    width = max(map(len, covered))
    lines = [f"{'module':{width}}  covered"]
    complaints = []
    for path, share in sorted(covered.items()):
        reason = reasons.get(path, "")
        lines.append(f"{path:{width}}  {share:6.0f}%  {reason}".rstrip())
        if share < ENOUGH and not reason:
            complaints.append(f"{path}: {share:.0f}% covered; add a reason to uncovered.toml")
    complaints += [
        f"{path}: no such module; remove its reason from uncovered.toml"
        for path in reasons.keys() - covered.keys()
    ]
    return "\n".join(lines), complaints


if __name__ == "__main__":
    raise SystemExit(main())
