"""How much memory this process has taken."""

import resource
import sys


def peak_resident_bytes() -> int:
    """Most bytes that this process has had in memory at a time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
