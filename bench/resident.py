"""The most memory that a process ever had resident, from Linux's own account."""

from pathlib import Path


def high_water_mb() -> float:
    """Of this process, since it began or since `forget_high_water`. A parent's account is not inherited."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("/proc/self/status holds no VmHWM: run this on Linux")


def forget_high_water() -> None:
    """Let the account begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
