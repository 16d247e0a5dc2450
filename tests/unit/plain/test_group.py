"""The processes that a launcher has started, by the environment."""

from __future__ import annotations

import pytest

from veneer.errors import ConfigError
from veneer.plain.group import group_size, join_slurm, n_on_this_machine, starts_processes

STEP = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_JOB_ID": "20017"}


def test_processes_are_started_where_no_launcher_has_started_any() -> None:
    assert [starts_processes(asked, {}) for asked in (None, 1, 3)] == [False, False, True]
    assert not starts_processes(None, {"WORLD_SIZE": "3"})
    assert not starts_processes(3, {"WORLD_SIZE": "3"})
    for here, asked in ((3, 2), (1, 2), (2, 1)):
        told = rf"has started {here} process(es)? here, and --processes asks for {asked}: leave"
        with pytest.raises(ConfigError, match=told):
            starts_processes(asked, {"WORLD_SIZE": str(here)})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("login1", "login1"),
        ("gpu3,gpu7", "gpu3"),
        ("gpu[003-007,9]", "gpu003"),
        ("gpu[9,11].local,x2", "gpu9.local"),
        ("login1,gpu[3-4]", "login1"),
    ],
)
def test_a_step_of_slurm_is_a_group(hosts: str, first: str) -> None:
    environment = {**STEP, "SLURM_STEP_NODELIST": hosts}
    join_slurm(environment)
    found = {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": first,
        "MASTER_PORT": str(29_500 + 17),
    }
    assert group_size(environment) == 6


def test_steps_of_one_job_meet_at_ports_of_their_own_and_a_given_host_stands() -> None:
    steps = [
        {**STEP, "SLURM_STEP_NODELIST": "gpu3", "SLURM_STEP_ID": each, "MASTER_ADDR": "ib7"} for each in ("0", "1")
    ]
    for each in steps:
        join_slurm(each)
    assert [each["MASTER_ADDR"] for each in steps] == ["ib7", "ib7"]
    assert len({each["MASTER_PORT"] for each in steps}) == 2


@pytest.mark.parametrize(("tasks", "here"), [("6", 6), ("2(x3)", 2), ("2(x2),1(x2)", 6), ("4,2", 6)])
def test_processes_of_this_machine_are_known_where_each_machine_has_as_many(tasks: str, here: int) -> None:
    environment = {**STEP, "SLURM_STEP_NODELIST": "gpu[3-5]", "SLURM_STEP_TASKS_PER_NODE": tasks}
    join_slurm(environment)
    assert n_on_this_machine(environment) == here


@pytest.mark.parametrize("other", [{"WORLD_SIZE": "2", **STEP}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {}])
def test_torchruns_group_stands_and_one_task_is_none(other: dict[str, str]) -> None:
    environment = dict(other)
    join_slurm(environment)
    assert environment == other
