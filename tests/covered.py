"""What the tests ran of each module, and why not the rest.

    coverage run -m pytest; coverage combine; python -m tests.covered

Exit status 1 where a module has less than `ENOUGH` of its lines covered and `uncovered.toml` gives
no reason, or gives one for a module that there is not.
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
    """Path of a module -> per cent of its lines that ran."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(out)]
        subprocess.run(command, check=True)
        files = json.loads(out.read_text())["files"]
    return {
        path: found["summary"]["percent_covered"]
        for path, found in files.items()
        if found["summary"]["num_statements"]
    }


def review(covered: dict[str, float], reasons: dict[str, str]) -> tuple[str, list[str]]:
    """(The table, what is wrong with the reasons)."""
    width = max(map(len, covered))
    lines = [f"{'module':{width}}  covered"]
    complaints = []
    for path, share in sorted(covered.items()):
        reason = reasons.get(path, "")
        lines.append(f"{path:{width}}  {share:6.0f}%  {reason}".rstrip())
        if share < ENOUGH and not reason:
            complaints.append(f"{path}: {share:.0f}% covered, and no reason in uncovered.toml")
    complaints += [
        f"{path}: a reason in uncovered.toml, and no such module"
        for path in reasons.keys() - covered.keys()
    ]
    return "\n".join(lines), complaints


if __name__ == "__main__":
    raise SystemExit(main())
