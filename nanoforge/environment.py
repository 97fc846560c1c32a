"""What this machine and this Python have: cores, memory, disk, packages, as far as that is known without them.

Imports no torch and no package that it looks for, and asks no network: it works where something is broken.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
IMPORT_SECONDS = 120  # after which an import counts as failed


# ---------------------------------------------------------------------------------------------------------------------
# cores, memory, disk


def read_number(path: Path, index: int = 0) -> float | None:
    """A number of a file that has some; None where it can't be read, or is `max`."""
    try:
        return float(path.read_text().split()[index])
    except (OSError, ValueError, IndexError):
        return None


def core_limit() -> float | None:
    """The CPUs that a container may use, by its cgroup's quota; None without one."""
    new = CGROUPS / "cpu.max"
    quota, period = read_number(new), read_number(new, 1)
    if quota is None:
        quota = read_number(CGROUPS / "cpu/cpu.cfs_quota_us")
        period = read_number(CGROUPS / "cpu/cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that this process can still have: of the machine, and within the cgroup's limit; None where not known."""
    numbers = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        n_limit, n_used = read_number(CGROUPS / limit), read_number(CGROUPS / used)
        if n_limit is not None and n_used is not None:
            numbers.append(n_limit - n_used)
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        numbers += [int(found[1]) * 1024] if found else []
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # a Mac: all it has
            numbers.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return int(max(0, min(numbers))) if numbers else None


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one around it that exists."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def free_disk(path: Path) -> int:
    """Bytes that are free where a folder lies, or will lie."""
    return shutil.disk_usage(existing_parent(path)).free


def processor() -> str:
    """The processor's name, where it is known."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# programs and packages


def output_of(*command: str, cwd: Path | None = None) -> str:
    """What a program prints; empty where it isn't installed or fails."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=IMPORT_SECONDS).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def nvidia_driver() -> str:
    """The version of NVIDIA's driver; empty without one."""
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


class Package(NamedTuple):
    """A package that requirements name."""

    name: str
    purpose: str = ""  # what it gives
    version: str = ""  # empty: not installed
    error: str = ""  # why it can't be imported


def read_requirements(path: Path) -> list[Package]:
    """The packages of a requirements file: `name>=1.2   # purpose` a line."""
    packages = []
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement, _, purpose = line.partition("#")
        found = re.match(r"[\w.-]+", requirement)
        if found and not requirement.startswith("-"):
            packages.append(Package(found[0], purpose.strip()))
    return packages


def look_for(packages: Iterable[Package]) -> list[Package]:
    """The packages with their versions, each imported in a process of its own, several at a time."""
    modules: dict[str, str] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            if not module.startswith("_"):
                modules.setdefault(normal(distribution), module)

    def look(package: Package) -> Package:
        try:
            version = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            return package
        module = modules.get(normal(package.name), normal(package.name))
        return package._replace(version=version, error=import_error(module))

    with ThreadPoolExecutor(max(1, usable_cores())) as pool:
        return list(pool.map(look, packages))


def normal(name: str) -> str:
    """A distribution's name as module names are written."""
    return re.sub(r"[-.]+", "_", name).lower()


def import_error(module: str) -> str:
    """The last line of what importing a module raises; empty where it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not imported within {IMPORT_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    return done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
