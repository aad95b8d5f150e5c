"""How much memory is left to take."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limits (cgroup v2)."""


def available(cgroup: Path = CGROUP) -> int:
    """Bytes of main memory that can be taken, within the limit of a container that has one."""
    free: int = psutil.virtual_memory().available
    limit = cgroup / "memory.max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return free
    lines = (cgroup / "memory.stat").read_text().splitlines()
    cached = dict(line.split() for line in lines)["inactive_file"]  # Given back when asked for.
    used = int((cgroup / "memory.current").read_text()) - int(cached)
    return max(0, min(free, int(most) - used))
