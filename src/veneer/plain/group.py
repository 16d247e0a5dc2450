"""Group of processes that a launcher has started for one run, as the environment describes it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

from veneer.errors import ConfigError

_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}  # torchrun's names, and the variables of a step of srun that say the same
_FIRST_PORT, _PORTS = 29_500, 10_000
_APART = 977  # ports between two steps of a job: the next one is that of the next job, which may share the machine


def group_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes that a launcher started together; 1 without one."""
    return int(environment.get("WORLD_SIZE", "1"))


def n_on_this_machine(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of the launcher's processes on this machine; the number of all if it does not say."""
    return int(environment.get("LOCAL_WORLD_SIZE", group_size(environment)))


def join_slurm(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from Slurm's, if ``srun`` started this process in a step of several tasks and they are
    not set yet.
    """
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    environment.update({name: environment[own] for name, own in _SLURM.items() if own in environment})
    even = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if even is not None:  # such as 4(x2): as many on each machine
        environment["LOCAL_WORLD_SIZE"] = even[1]
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (job + _APART * step) % _PORTS))


def starts_processes(asked: int | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if ``asked`` processes are to be started here: several, and no launcher has started any.

    Raises ConfigError if a launcher has started a number of processes other than ``asked``.
    """
    if asked is None:
        return False
    if "WORLD_SIZE" in environment and asked != (here := group_size(environment)):
        raise ConfigError(
            f"a launcher has started {here} process{'es' if here > 1 else ''} here, and --processes asks for {asked}: "
            f"leave --processes out, or let the launcher start {asked}"
        )
    return asked > 1 and "WORLD_SIZE" not in environment


def _first_host(hosts: str) -> str:
    """Return the first name of Slurm's list of hosts, such as ``gpu[003-007,9],login1``."""
    name, bracket, numbers = hosts.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    inside, _, rest = numbers.partition("]")
    return name + inside.partition(",")[0].partition("-")[0] + rest.partition(",")[0]
