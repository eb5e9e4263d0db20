"""One of several processes that train the toy stage over a mesh of four devices, with mishaps.

    python -m tests.training.toy_job PROCESS_ID NUM_PROCESSES PORT RUN RESULT STEPS [WHAT:WHERE:AT]

WHERE is the process to which it happens; WHAT: `term`, `stop` and `kill` are signals in step AT,
`kill_in_save` and `kill_in_data` the latter in a save and while a batch is read, `hang` is a step
that never ends, `full` a disk without room from step AT on, `unreadable` the part that this process
reads of checkpoint AT. How it ended is printed after `ended: `.
"""

import os
import pathlib
import resource
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.distributed import multihost, partitioning
from omniforcing_jax.training import training_checkpoints
from omniforcing_jax.training.state import state_shardings
from tests.training.toy_stage import WIDTH, ToyBatches, ToyStage, amid_saves, toy_params, train_toy

DEVICES = 4


def place(tree, spec):
    """Host arrays, the same on all processes, onto the mesh."""

    def one(x):
        x = np.asarray(x)
        sharding = NamedSharding(jax.sharding.get_mesh(), spec(x))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def split(x) -> P:
    return P(*(None,) * (x.ndim - 2), "fsdp") if x.shape[-2] == WIDTH else P()


class Mishap:
    """What shall happen to this process, and when."""

    def __init__(self, process_id: int, text: str):
        what, where, at = text.split(":")
        self.what = what if int(where) == process_id else ""
        self.signalled = what == "term"
        self.at = int(at)

    def step(self, step: int) -> None:
        if step == self.at and self.what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.at and self.what in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.what == "kill" else signal.SIGSTOP)
        if step == self.at and self.what == "hang":
            threading.Event().wait()
        if step == self.at and self.what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        if self.signalled and step >= self.at:
            time.sleep(0.5)  # the processes agree on a step in the background

    def data(self, index: int) -> None:
        if index == self.at and self.what == "kill_in_data":
            os.kill(os.getpid(), signal.SIGKILL)

    def read(self, step: int) -> None:
        if step == self.at and self.what == "unreadable":
            raise ValueError("a chunk is truncated")

    def save(self, index: int) -> None:
        if index == self.at and self.what == "kill_in_save":
            os.kill(os.getpid(), signal.SIGKILL)


def main(process_id, num_processes, port, run, result, steps, mishap="none:0:-1") -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // int(num_processes))
    job = multihost.find_job(None, f"127.0.0.1:{port}", int(num_processes), int(process_id))
    multihost.join(job, timeout=120, heartbeat=10)
    mishap = Mishap(int(process_id), mishap)

    class Batches(ToyBatches):
        def __next__(self):
            mishap.data(self.index)
            return place(super().__next__(), lambda x: P(partitioning.BATCH_AXES))

    class Stage:
        def train_step(self, state, frozen, batch, step):
            mishap.step(step)
            return jitted(state, nothing, batch)

    amid_saves(mishap.save)
    checkpoints = training_checkpoints.TrainingCheckpoints
    read = checkpoints._read_state

    def read_or_fail(self, step, *args):
        mishap.read(step)
        return read(self, step, *args)

    checkpoints._read_state = read_or_fail
    mesh = partitioning.make_mesh(data=2, fsdp=2)
    try:
        with jax.set_mesh(mesh), multihost.Watchdog(20, name=str(job)) as dog:
            toy = ToyStage()
            nothing = place(np.float32(0), lambda x: P())
            state = toy.init_state(place(toy_params(), split))
            jitted = jax.jit(
                toy.jitted.__wrapped__,
                donate_argnums=0,
                out_shardings=(state_shardings(state), None),
            )
            outcome = train_toy(
                run, int(steps), Stage(), state=state, batches=Batches(), compile_steps=1,
                watchdog=dog,
            )  # fmt: skip
            whole = jax.jit(lambda s: s, out_shardings=NamedSharding(mesh, P()))(outcome.state)
    except Exception as error:
        error = multihost.explained(error, str(job))
        status = getattr(error, "exit_status", 1)
        print(f"ended: {status} {error}", flush=True)
        multihost.leave(status)
    if job.process_id == 0:
        np.savez(pathlib.Path(result), *jax.tree.leaves(jax.device_get(whole)))
    print("ended:", outcome.reason)


if __name__ == "__main__":
    main(*sys.argv[1:])
