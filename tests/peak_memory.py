"""Memory of a process by what it holds, and its peak without what the allocator keeps for later."""

import ctypes


def give_back_what_is_freed() -> None:
    """Have malloc map each block of 128 kB or more by itself, and unmap it when it is freed.

    Without this glibc raises the bound to the largest block that was freed, up to 32 MB, and keeps blocks below it:
    the peak of one and the same program then differs from run to run by whole tensors.
    """
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 17)


def own_bytes() -> int:
    """Return the bytes that this program has written, in memory or swapped out: other programs do not change them."""
    with open("/proc/self/status", encoding="ascii") as status:
        return 1024 * sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "VmSwap")))


def high_water() -> int:
    """Return the peak of this program's resident memory in bytes; getrusage counts what it was before exec, too."""
    with open("/proc/self/status", encoding="ascii") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
