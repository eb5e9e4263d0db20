"""How much memory this process takes, and has taken."""

import os
import pathlib
import resource
import subprocess
import sys

_STATM = pathlib.Path("/proc/self/statm")


def peak_resident_bytes() -> int:
    """Most bytes that this process has had in memory at a time; never falls."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def resident_bytes() -> int:
    """Bytes that this process has in memory now."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    # macOS has no /proc; its ps, as any, counts KiB
    answer = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(answer.stdout) * 1024


def bytes_in_use(device) -> int:
    """Bytes in use now: of a JAX device, or of this process where the device does not say."""
    stats = device.memory_stats()
    return stats["bytes_in_use"] if stats else resident_bytes()


def peak_bytes(device) -> tuple[int, str]:
    """Most bytes in use until now, and whose they are: "device" or "process"."""
    stats = device.memory_stats()
    return (stats["peak_bytes_in_use"], "device") if stats else (peak_resident_bytes(), "process")
