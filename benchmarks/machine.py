"""What the numbers were taken on, and who else was using it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# What says how many threads a framework uses and on which device; told with the results when set.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "JAX_", "KMP_", "MKL_", "OMP_", "OPENBLAS_", "TORCH", "XLA_FLAGS")


def process_seconds(pid: int) -> float:
    """CPU time of a process's threads so far, from /proc; 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float | None:
    """CPU time that all processors together have spent at work (or lost to other guests), from /proc."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    described = {
        "CPU": models[0].partition(":")[2].strip() if models else platform.processor() or "unknown",
        "cores": str(cores()),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    described |= {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return described
