"""Stage III of the distillation; see configs/stage3.py for its variants and what to expect.

    python -m launch.stage3 --config=configs/stage3.py:19b --workdir=runs/stage3

Started again with the same workdir, a run goes on where it was; SIGTERM saves it first. --plan
prints what it needs, and exits.
"""

from launch import training
from omniforcing_jax.distributed import multihost

if __name__ == "__main__":
    multihost.end(training.main("stage3"))
