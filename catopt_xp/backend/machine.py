"""Facts about this machine: its processors, threads and free memory."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

if sys.platform != "win32":
    import resource


from catopt_xp.io.console import warn


def cpu_model() -> str:
    """The name of this machine's processor.

    >>> cpu_model() != ""
    True
    """
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def cpu_count(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many logical processors this process may use: those it may run on, within the quota of its container.

    A quota of one and a half processors counts as two.

    Args:
        proc, cgroup: where Linux shows the quota (other places are for tests).

    >>> cpu_count() >= 1
    True
    """
    if sys.platform == "linux":
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return max(1, math.ceil(min(processors, _processor_quota(proc, cgroup))))


@functools.cache  # read once in a process: `thread_count` is asked at every step of training
def _processor_quota(proc: Path, cgroup: Path) -> float:
    """How many processors' time the control groups around this process allow it; infinity where none limits it."""
    quotas = [math.inf]
    for version, folder in _control_groups("cpu", proc, cgroup):
        # Quota and period, both in microseconds: in one file, or in two.
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        if all((folder / name).is_file() for name in names):
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):  # how each version says that there is no limit
                quotas.append(int(quota) / int(period))
    return min(quotas)


THREADS: ContextVar[int | None] = ContextVar("threads", default=None)
"""What ``limited_threads`` says for its block."""


def thread_count() -> int:
    """Threads to use here: those of a surrounding ``limited_threads``, else by the environment, else one per processor.

    Of the environment variables ``OMP_NUM_THREADS`` and ``NUMBA_NUM_THREADS`` the smaller one counts. One that is no
    number from 1 counts for nothing, which a warning says, once.

    >>> thread_count() >= 1
    True
    """
    limit = THREADS.get()
    if limit is not None:
        return limit
    wanted = [_wanted_threads(name, os.environ.get(name, "")) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")]
    return min((number for number in wanted if number is not None), default=None) or cpu_count()


@functools.cache  # said once, and read at every step of training
def _wanted_threads(name: str, value: str) -> int | None:
    """The threads that an environment variable asks for, of a list the first number; None where it asks for none."""
    first = value.split(",")[0].strip()
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", first, re.ASCII):
        return int(first)
    if first:
        warn(f"{name} is {value!r}, which is no number of threads from 1: it is ignored")
    return None


MOST_BYTES = 2.0**63  # which no address reaches


def memory_size(value: int | str) -> int:
    """Bytes, given as a number or as a text with a unit: kB, MB, GB, TB, or KiB, MiB, GiB, TiB.

    Raises:
        ValueError: neither, or less than one byte, or more than a computer can have.

    >>> memory_size("1.5 GB"), memory_size("2MiB"), memory_size(1000)
    (1500000000, 2097152, 1000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", str(value).strip().lower())
    size = 0
    if match is not None and not isinstance(value, bool):
        number, unit, binary = match.groups()
        bytes_of_all = float(number) * (1024 if binary else 1000) ** ("kmgt".find(unit) + 1 if unit else 0)
        size = round(bytes_of_all) if bytes_of_all < MOST_BYTES else 0
    if size < 1:
        raise ValueError(f"{value!r} is no amount of memory; give bytes, or a text such as 500MB or 1.5GB")
    return size


def size_text(size: int) -> str:
    """Bytes as `memory_size` reads them, rounded up to three digits or more.

    >>> size_text(1_500_000_000), size_text(2_345_678), size_text(12)
    ('1.5GB', '2.35MB', '0.02kB')
    """
    digits, unit = next(((n, unit) for n, unit in ((9, "GB"), (6, "MB")) if size >= 10**n), (3, "kB"))
    whole, hundredths = divmod(-(-size // 10 ** (digits - 2)), 100)
    return f"{whole}.{hundredths:02}".rstrip("0").rstrip(".") + unit


def host_free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: what the system can give, within the limits of its container.

    Args:
        proc, cgroup: where Linux shows both (other places are for tests).

    Raises:
        OSError: this system does not tell.

    >>> host_free_memory() > 0
    True
    """
    return max(0, min([_system_available(proc), *_room_in_control_groups(proc, cgroup)]))


def free_room() -> int:
    """Bytes of memory that arrays may take: what is free, or any number where the system does not tell."""
    try:
        return host_free_memory()
    except OSError:
        return 1 << 62


def _system_available(proc: Path) -> int:
    meminfo = proc / "meminfo"
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):  # macOS tells the installed pages only
        if pages in getattr(os, "sysconf_names", {}):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    raise OSError(f"the free memory of this system ({platform.system()}) cannot be read: it has no {meminfo}")


def address_room(proc: Path = Path("/proc")) -> float:
    """Bytes that a limit on the address space of this process (ulimit -v) leaves; infinity where there is none.

    Args:
        proc: where Linux shows what is taken (another place is for tests).

    >>> address_room() > 0
    True
    """
    sizes = proc / "self" / "statm"  # in pages, the first that of the address space
    if sys.platform != "win32" and sizes.is_file():
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            return limit - int(sizes.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def _room_in_control_groups(proc: Path, cgroup: Path) -> Iterator[int]:
    """What each memory limit on this process, and on the groups around it, leaves."""
    for version, folder in _control_groups("memory", proc, cgroup):
        if version == 2:
            limit, usage, cached = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        if (folder / limit).is_file() and (folder / usage).is_file():
            most = (folder / limit).read_text().strip()
            if most != "max":
                # File pages in the cache are given back under pressure: they count as room.
                droppable = _statistic(folder / "memory.stat", cached)
                yield int(most) - int((folder / usage).read_text()) + droppable


def _control_groups(controller: str, proc: Path, cgroup: Path) -> Iterator[tuple[int, Path]]:
    """The control groups around this process that may limit it: the version of their interface, and their folder."""
    membership = proc / "self" / "cgroup"  # lines of "number:controllers:path"
    text = os.fsdecode(membership.read_bytes()) if membership.is_file() else ""  # whatever the locale
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, root = 2, cgroup
        elif controller in controllers.split(","):
            version, root = 1, cgroup / controller
        else:
            continue
        group = root / path.strip("/")
        # Inside a container the path may name a folder of the host that is not seen here: its parents are.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield version, folder


def _statistic(file: Path, name: str) -> int:
    for line in file.read_text().splitlines() if file.is_file() else []:
        key, value = line.split()
        if key == name:
            return int(value)
    return 0
