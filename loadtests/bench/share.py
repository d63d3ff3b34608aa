"""A share of a core for a process and its children, by a control group: what stands in for a machine of that size.

It takes Linux and the right to make control groups, which is root's; version 1 and version 2 are both understood.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Short, so that an answer waits for the next share no longer than that.
PERIOD = 20_000  # microseconds
_FIRST, _SECOND = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextmanager
def share_of_a_core(name: str, process: int, share: float) -> Iterator[None]:
    """Give a process and its children that share of a core inside the block.

    Args:
        name: of the process, for the group.
        process: its id.
        share: of one core.
    """
    old = _FIRST.is_dir()
    group = (_FIRST if old else _SECOND) / f"bench-{name}-{process}"
    quota = str(round(PERIOD * share))
    try:
        group.mkdir()
        if old:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(quota)
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
    except OSError as error:
        sys.exit(f"{error}: a share of a core takes control groups, as root.")
    try:
        for member in (process, *_children(process)):
            (group / "cgroup.procs").write_text(str(member))
        yield
    finally:
        for member in map(int, (group / "cgroup.procs").read_text().split()):
            with suppress(OSError):  # it has ended meanwhile
                (group.parent / "cgroup.procs").write_text(str(member))
        group.rmdir()


def _children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]
