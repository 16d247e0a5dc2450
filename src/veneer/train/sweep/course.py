"""Course of a sweep: each member's progress, which is also kept on disk, and the jobs that are to be trained next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from veneer.errors import ConfigError, FormatError, TrainingError
from veneer.train.checkpoint import checkpoints, write_json
from veneer.train.record.going_on import GoingOn, changes_since, is_complete
from veneer.train.record.place import Resume, require_fresh
from veneer.train.record.record import RUN_FILE, record_of
from veneer.train.sweep.asha import Standing, divisor, n_rungs, promotions
from veneer.train.sweep.recipe import Member, Sweep
from veneer.train.sweep.together import Job, JobEnd

RUNGS_FILE, STOPPED = "rungs.json", "stopped"
_MOST_LOST = 3  # workers that may die under a member before the sweep gives up


class Course:
    """Progress of each member of a sweep, and the jobs that are left. A job trains a member up to its
    next rung or end.
    """

    def __init__(self, sweep: Sweep, resume: Resume, allow_changes: bool) -> None:
        self._members = {member.name: member for member in sweep.members}
        self._allow_changes, self._reduction, self._output = allow_changes, sweep.reduction, sweep.output
        self._n_rungs = n_rungs(len(self._members), sweep.reduction) if sweep.scheduler == "asha" else 0
        self.standings = self._read() if resume and self._n_rungs else dict.fromkeys(self._members, Standing())
        self.records: dict[str, dict[str, Any]] = {}
        self._begun_with: dict[str, GoingOn | None] = {}  # what a member's first job goes on from
        self._under_way: set[str] = set()
        self._lost: dict[str, int] = dict.fromkeys(self._members, 0)
        for name, member in self._members.items():
            before, going_on = _as_it_was(member, resume, allow_changes)
            if before is not None:
                self._end(name, before)
            self._begun_with[name] = going_on
        self._promote()

    def next_jobs(self, n_idle: int, n_places: int) -> list[Job]:
        """Return the jobs that train together next, and mark them as running. The list is empty if no member waits.

        ``n_idle``: the idle workers. ``n_places``: the members for which one worker has memory.
        """
        behind = {
            name: len(each.losses)
            for name, each in self.standings.items()
            if each.trains and name not in self._under_way
        }
        names = next_pack(behind, n_idle, n_places) if behind else []
        self._under_way |= set(names)
        return [self._job(name) for name in names]

    def note(self, jobs: Sequence[Job], ended: Sequence[JobEnd]) -> None:
        """Record how jobs that trained together ended, and promote the members that are good enough to a further
        stretch.
        """
        for job, each in zip(jobs, ended, strict=True):
            name = job.member.name
            self._under_way.discard(name)
            if each.loss is not None:
                losses = (*self.standings[name].losses, math.inf if math.isnan(each.loss) else each.loss)
                self.standings[name] = replace(self.standings[name], losses=losses)
                self.records[name] = each.record
            elif each.record["status"] != "interrupted":
                self._end(name, each.record)
        self._promote()

    def note_lost(self, jobs: Sequence[Job], reason: str) -> None:
        """Restart the jobs of a worker that has died from their last checkpoints, except those that had ended.

        Raises TrainingError for a member whose workers have died several times.
        """
        for job in jobs:
            name = job.member.name
            self._under_way.discard(name)
            before, _ = _as_it_was(job.member, "auto", self._allow_changes)
            if before is not None:
                self._end(name, before)
                continue
            self._lost[name] += 1
            if self._lost[name] > _MOST_LOST:
                raise TrainingError(
                    f"{self._lost[name]} workers that trained {name} have died: {reason}. Give them more memory, then "
                    "continue with --resume"
                )
        self._promote()

    def finish(self) -> list[dict[str, Any]]:
        """Mark the members that may not train further as stopped, and return the records of all members, in their
        order.
        """
        for name, each in self.standings.items():
            if not each.over and each.losses:
                self.records[name] = self._stopped(name, each)
        return [self.records[name] for name in self._members]

    def _end(self, name: str, record: dict[str, Any]) -> None:
        self.standings[name], self.records[name] = replace(self.standings[name], over=True), record

    def _job(self, name: str) -> Job:
        member, stretch = self._members[name], len(self.standings[name].losses)
        if name in self._begun_with:
            going_on = self._begun_with.pop(name)
        else:
            _, going_on = _as_it_was(member, "auto", self._allow_changes)
        return Job(member, going_on, divisor(stretch, self._n_rungs, self._reduction))

    def _promote(self) -> None:
        for name in promotions(self.standings, self._n_rungs, self._reduction):
            self.standings[name] = replace(self.standings[name], granted=self.standings[name].granted + 1)
        if self._n_rungs:
            write_json(self._output / RUNGS_FILE, self._as_json())

    def _stopped(self, name: str, standing: Standing) -> dict[str, Any]:
        """Record in a member's ``run.json`` that its training was stopped."""
        output = Path(self._members[name].recipe.output)
        record = cast("dict[str, Any]", record_of(output))
        if record["status"] != STOPPED:
            key = "eval_loss" if self._members[name].recipe.data.holds_out else "train_loss"
            record |= {
                "status": STOPPED,
                "reason": f"asha: not among the best, one in {self._reduction}, at rung {len(standing.losses)}",
                "results": {"steps": record["step"], key: _told(standing.losses[-1])},
            }
            write_json(output / RUN_FILE, record)
        return record

    def _as_json(self) -> dict[str, Any]:
        members = {
            name: {"losses": [_told(loss) for loss in s.losses], "granted": s.granted}
            for name, s in self.standings.items()
        }
        return {"format": 1, "reduction": self._reduction, "members": members}

    def _read(self) -> dict[str, Standing]:
        """Read the progress from which a resumed sweep continues. Raises ConfigError if its members have changed."""
        path = self._output / RUNGS_FILE
        if not path.exists():
            return dict.fromkeys(self._members, Standing())
        try:
            found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            standings = {
                name: Standing(
                    tuple(math.inf if loss is None else float(loss) for loss in each["losses"]), int(each["granted"])
                )
                for name, each in found["members"].items()
            }
            reduction = int(found["reduction"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} cannot be read ({error}): restore it, or choose another output") from error
        if (set(standings), reduction) != (set(self._members), self._reduction):
            raise ConfigError(
                f"the sweep in {self._output} was begun with other rungs: {len(standings)} members and a reduction of "
                f"{reduction}. Take the same members and reduction, or another output (--set output=…)."
            )
        return {name: standings[name] for name in self._members}


def _told(loss: float) -> float | None:
    """Convert a loss for JSON: null if it is not finite."""
    return loss if math.isfinite(loss) else None


def _as_it_was(member: Member, resume: Resume, allow_changes: bool) -> tuple[dict[str, Any] | None, GoingOn | None]:
    """Return what an earlier run left of a member: its record if it has finished, or the state from which it resumes.

    The other entry is None. Both are None if the member starts anew.
    """
    recipe, output = member.recipe, Path(member.recipe.output)
    require_fresh(output, resume)
    before = record_of(output) if resume else None
    found = changes_since(before, recipe, allow_changes) if before is not None else []
    if before is not None and (is_complete(before, recipe) or (before["status"] == "diverged" and not found)):
        return before, None
    return None, GoingOn(before, found, allow_changes) if resume and checkpoints(output) else None


def next_pack(waiting: Mapping[str, int], n_idle: int, n_places: int) -> list[str]:
    """Return the members that train together next: first those that have trained the most stretches, then by their
    order.

    ``waiting``: for each waiting member, the number of stretches that it has trained. At most ``n_places`` members are
    returned, and enough are left for the other idle workers.
    """
    size = min(n_places, -(-len(waiting) // n_idle))
    return sorted(waiting, key=lambda name: -waiting[name])[:size]
