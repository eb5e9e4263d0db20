"""Stage II of the distillation; see configs/stage2.py for its variants and what to expect.

    python -m launch.stage2 --config=configs/stage2.py:19b --workdir=runs/stage2

Started again with the same workdir, a run goes on where it was; SIGTERM saves it first. --plan
prints what it needs, and exits.
"""

from launch import training
from omniforcing_jax.distributed import multihost

if __name__ == "__main__":
    multihost.end(training.main("stage2"))
