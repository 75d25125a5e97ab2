"""What a run's sample logs tell: which group did which step, on which samples, and when."""

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Attempt:
    """A group of workers from its start to its end.

    `steps` has, by step, the rows of its ranks.
    """

    world_size: int
    steps: dict = field(default_factory=dict)

    def whole(self):
        """The steps that every rank noted, in order."""
        return [s for s in sorted(self.steps) if len(self.steps[s]) == self.world_size]

    @property
    def start(self):
        """The step that it went on from."""
        return min(self.steps) - 1

    def pids(self):
        """The process of each rank."""
        return {row["rank"]: row["pid"] for rows in self.steps.values() for row in rows}


def attempts(folder):
    """The groups of a run in the order in which they began.

    Ranks of one group do their first step together, so that groups are told apart by time.
    """
    files = []
    for path in Path(folder).glob("*.jsonl"):
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        if rows:
            files.append(rows)
    found, groups = [], {}
    for rows in sorted(files, key=lambda rows: rows[0]["time"]):
        first = rows[0]
        group = groups.get(first["world_size"])
        if group is None or first["rank"] in group.pids():
            group = Attempt(first["world_size"])
            groups[first["world_size"]] = group
            found.append(group)
        for row in rows:
            group.steps.setdefault(row["step"], []).append(row)
    return found


def trajectory(folder):
    """The samples of each step as the group that did it last saw them; how often it was done."""
    found, times = {}, {}
    for attempt in attempts(folder):
        for step in attempt.whole():
            found[step] = sorted(s for row in attempt.steps[step] for s in row["samples"])
            times[step] = times.get(step, 0) + 1
    return found, times


def check_epochs(found, steps_per_epoch, batch):
    """Each sample at most once an epoch, and exactly batch x steps of them in whole epochs."""
    epochs = {}
    for step, samples in found.items():
        assert len(samples) == batch, f"step {step} had {len(samples)} samples"
        epochs.setdefault((step - 1) // steps_per_epoch, []).extend(samples)
    for epoch, samples in epochs.items():
        assert len(samples) == len(set(samples)), f"epoch {epoch} saw a sample twice"
    assert sorted(found) == list(range(1, max(found) + 1))
