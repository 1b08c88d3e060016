"""What a fault may lead to: the correct result, or one clear line and exit status 2."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

CORRECT, CLEAR = "correct result", "clear error"
ACCEPTED = (CORRECT, CLEAR)

Check = Callable[[], str]
"""What is wrong with a result; empty where nothing is."""


@dataclass
class Tally:
    """Counts of the outcomes of each fault, and what was not accepted."""

    counts: dict[str, Counter] = field(default_factory=dict)
    unaccepted: list[str] = field(default_factory=list)

    def add(self, fault: str, outcome: str, where: str = "") -> None:
        self.counts.setdefault(fault, Counter())[outcome if outcome in ACCEPTED else "other"] += 1
        if outcome not in ACCEPTED:
            self.unaccepted.append(f"{fault} {where}: {outcome}")

    def total(self) -> int:
        return sum(found.total() for found in self.counts.values())

    def table(self) -> str:
        """Markdown: a row a fault."""
        lines = [
            "| fault | times | correct result | clear error | anything else |",
            "| --- | --- | --- | --- | --- |",
        ]
        for fault, found in self.counts.items():
            cells = (found.total(), found[CORRECT], found[CLEAR], found["other"])
            lines.append(f"| {fault} | {' | '.join(str(cell) for cell in cells)} |")
        return "\n".join([*lines, f"| all | {self.total()} | | | {len(self.unaccepted)} |"])


def judge(code: int, errors: str, correct: Check, unharmed: Check) -> str:
    """The outcome of a command: `correct` looks at what exit status 0 left, `unharmed` at what
    status 2 did."""
    if code == 0:
        problem = correct()
        return f"wrong result: {problem}" if problem else CORRECT
    if code != 2:
        return f"exit status {code}: {errors.strip()[-400:]}"
    lines = [line for line in errors.splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].startswith("fastlab: "):
        return f"not one line: {errors.strip()[-400:]}"
    problem = unharmed()
    return f"an error that left harm: {problem}" if problem else CLEAR
