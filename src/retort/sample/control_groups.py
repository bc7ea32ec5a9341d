"""What Linux lets this process take: a container, a batch system's job and a service have limits of
their own, below the machine's memory, and a process that passes one is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Files:
    """Where a group says what it may take and takes, and the line of its `memory.stat` that counts
    what was read of files and not used lately: taken, but given back as soon as it is needed.
    """

    limit: str
    used: str
    returned: str


VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def memory_left(mount: Path = MOUNT, own: Path = OWN) -> float:
    """Bytes that the groups of this process may still take, infinite where none is limited."""
    return min((_left(group, files) for group, files in _groups(mount, own)), default=float("inf"))


def _groups(mount: Path, own: Path) -> Iterator[tuple[Path, _Files]]:
    """The groups that limit memory, outermost first: each is within the one before."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = mount, VERSION_2
        elif "memory" in controllers.split(","):
            top, files = mount / "memory", VERSION_1
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth]), files


def _left(group: Path, files: _Files) -> float:
    try:
        limit = (group / files.limit).read_text().strip()
        used = int((group / files.used).read_text())
        told = (group / "memory.stat").read_text().splitlines()
    except OSError:  # the outermost has no limit, and a container does not see those around it
        return float("inf")
    counts = dict(line.split(maxsplit=1) for line in told)
    return float("inf") if limit == "max" else float(limit) - used + int(counts[files.returned])
