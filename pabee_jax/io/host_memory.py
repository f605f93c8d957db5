"""The memory of the host: what is free now, and what a process may use at most."""

import re
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limits.
    resource = None

_NO_LIMIT = 2**60  # Larger values in the files of the operating system mean "unlimited".


def free_bytes() -> int | None:
    """Return the host's free memory within the container's limit; None if it is not known.

    Unlike `limit_bytes`, this is what can be taken now without swapping: it leaves out swap space
    and what the container uses already.
    """
    try:
        # Not sysconf's free pages, which exclude the memory that the file cache can release.
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free_bytes = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    try:  # A container may have less memory than the host.
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii"))
            for name in ("max", "current")
        )
        return max(0, min(free_bytes, limit - used))
    except (OSError, ValueError):  # There is no limit.
        return free_bytes


def limit_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process may still use; None if unknown.

    Args:
        root: the directory that contains the operating system's `proc` and `sys`.
    """
    limits = [_available_bytes(root / "proc/meminfo")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # cgroup version 2
            folder, file = "sys/fs/cgroup", "memory.max"
        elif controllers == "memory":
            folder, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container, the file system may contain the group of the container only.
        for path in (root / folder / group.strip("/") / file, root / folder / file):
            limits += [int(text) for text in _lines(path) if text.isdigit()]
    if resource is not None:  # "Unlimited" is -1.
        limits.append(max(0, resource.getrlimit(resource.RLIMIT_AS)[0]))
    return min((limit for limit in limits if limit and limit < _NO_LIMIT), default=None)


def _available_bytes(meminfo: Path) -> int | None:
    sizes = [re.match(r"(MemAvailable|SwapFree): *(\d+) kB", line) for line in _lines(meminfo)]
    return 1024 * sum(int(size[2]) for size in sizes if size) or None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # Not Linux, or not allowed.
        return []
