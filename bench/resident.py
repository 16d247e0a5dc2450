"""The most memory that a process ever had resident, from Linux's own account."""

from pathlib import Path


def high_water_mb() -> float:
    """Return the high water of this process since `forget_high_water` or its begin; a parent's is not inherited."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("/proc/self/status holds no VmHWM: run this on Linux")


def forget_high_water() -> None:
    """Let the account begin again at the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
