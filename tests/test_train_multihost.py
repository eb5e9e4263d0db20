"""Training in two processes, of which one is told to stop. Slow: each start of two takes 10 s."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from omniforcing_jax.metrics import read_records
from tests.toy_stage import train_toy

PROGRAM = """
import os, sys, time
import jax, numpy as np
index, run, port, stop_at, result = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index), initialization_timeout=60)
from jax.sharding import NamedSharding, PartitionSpec as P
from omniforcing_jax.models import transformer
from omniforcing_jax import partitioning
from omniforcing_jax.train_state import state_shardings
from tests.toy_stage import *

mesh = partitioning.make_mesh(data=2, fsdp=2)

def place(tree, spec):
    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec(x)), lambda i: x[i])
    return jax.tree.map(one, tree)

def split(x):
    return P(*(None,) * (x.ndim - 2), "fsdp") if x.shape[-2] == WIDTH else P()

class Batches(ToyBatches):
    def __next__(self):
        return place(super().__next__(), lambda x: P(partitioning.BATCH_AXES))

class Stage:
    def train_step(self, state, frozen, batch, step):
        if index == "1" and step == int(stop_at):
            os.kill(os.getpid(), signal.SIGTERM)
        if -1 < int(stop_at) <= step:
            time.sleep(0.5)  # the processes agree on a step in the background
        return jitted(state, np.float32(0), batch)

with jax.set_mesh(mesh):
    toy = ToyStage()
    state = toy.init_state(place(toy_params(), split))
    jitted = jax.jit(toy.jitted.__wrapped__, donate_argnums=0,
                     out_shardings=(state_shardings(state), None))
    outcome = train_toy(run, 20, Stage(), state=state, batches=Batches(), compile_steps=1)
    whole = jax.jit(lambda s: s, out_shardings=NamedSharding(mesh, P()))(outcome.state)
np.savez(f"{result}{index}", *jax.tree.leaves(jax.device_get(whole)))
print(outcome.reason)
"""


def launch(run, result, stop_at: int) -> list[str]:
    """Runs both processes; their last lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), str(run), port, str(stop_at), str(result)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
        )
        for i in range(2)
    ]
    lines = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        lines.append(out.splitlines()[-1])
    return lines


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(tmp_path):
    run, result = tmp_path / "run", tmp_path / "state"
    assert launch(run, result, stop_at=7) == ["preempted"] * 2
    assert launch(run, result, stop_at=-1) == ["finished"] * 2
    names = {path.name for path in (run / "checkpoints" / "20" / "data").iterdir()}
    assert {"process_0-of-2.json", "process_1-of-2.json"} <= names
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [4, 8, 12, 16, 20]
    expected = jax.tree.leaves(train_toy(tmp_path / "one", 20).state)
    for index in range(2):
        saved = np.load(f"{result}{index}.npz")
        for name, leaf in zip(saved.files, expected, strict=True):
            np.testing.assert_allclose(saved[name], leaf, atol=5e-5, rtol=1e-4)
