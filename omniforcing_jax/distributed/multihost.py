"""Several processes as one job: joining, agreeing, and ending when one is lost or hangs.

Every host of a TPU pod or GPU cluster runs the same program. `find_job` and `join` bring them
together; what differs between them, or fails on one of them, is made known to all (`all_true`,
`check_same`), since a process that turns off the common path leaves the others waiting in a
collective operation. A process that dies is noticed by JAX's heartbeat, one that lives and does
nothing by its own `Watchdog`.
"""

import contextlib
import dataclasses
import faulthandler
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

# Exit statuses, besides 0, 1 (failed), 2 (refused) and 134 (JAX's heartbeat ended the process).
NOT_JOINED = 3
LOST = 4
HUNG = 5
STOPPED = 143  # saved after a SIGTERM or a preemption notice: start the same command again

HOW_TO_JOIN = (
    "on TPU pods --distributed is enough; under SLURM start the program with srun; on other hosts "
    "give all of --coordinator HOST:PORT, --num_processes N and --process_id I (or "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID), where HOST is that of process "
    "0, which every host must reach at PORT"
)
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# In messages about connections; the lower layers know no types of errors.
_CONNECTION = ("Gloo", "gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


class ProcessLost(RuntimeError):
    """Another process of the job has most likely ended."""

    exit_status = LOST


class NotJoined(RuntimeError):
    """The processes did not come together; says which are missing."""

    exit_status = NOT_JOINED


@dataclasses.dataclass(frozen=True)
class Job:
    """The processes of one job.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes, process_id: how many there are, and which one this is.

    All are None where JAX finds them out itself (TPU pods; SLURM without a given coordinator).
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __str__(self) -> str:
        if self.coordinator is None:
            return "this process"
        return f"process {self.process_id} of {self.num_processes}"


def find_job(
    distributed: bool | None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Job | None:
    """Which job this process belongs to, from flags, JAX's variables, and the cluster's.

    Args:
      distributed: True: it belongs to one; False: it does not; None: as flags and environment say.
      coordinator, num_processes, process_id: as given by flags; the environment fills in.

    Returns:
      None for a process on its own.

    Raises:
      ValueError: flags and variables contradict each other or are not complete.
    """
    by_flag = any(value is not None for value in (coordinator, num_processes, process_id))
    if distributed is False:
        if by_flag:
            raise ValueError(
                "--nodistributed contradicts --coordinator, --num_processes and --process_id"
            )
        return None
    address, count, index = _ENVIRONMENT
    given = {
        "coordinator": coordinator or environment.get(address) or None,
        "num_processes": _number(num_processes, count, environment),
        "process_id": _number(process_id, index, environment),
    }
    in_slurm = all(name in environment for name in _SLURM)
    tasks = int(environment["SLURM_NTASKS"]) if in_slurm else 1
    if given["coordinator"] is not None and in_slurm:  # SLURM knows the rest
        slurm = {"num_processes": tasks, "process_id": int(environment["SLURM_PROCID"])}
        given |= {name: value for name, value in slurm.items() if given[name] is None}
    there = [name for name, value in given.items() if value is not None]
    missing = [name for name, value in given.items() if value is None]
    on_tpu_pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if missing and not by_flag and (distributed or on_tpu_pod):
        return Job()  # JAX reads these variables, too, and finds the rest
    if there and missing:
        raise ValueError(
            f"--{' and --'.join(there)} without --{' and --'.join(missing)}: {HOW_TO_JOIN}"
        )
    if there:
        return _checked(Job(**given))
    return Job() if tasks > 1 else None


def _number(value: int | None, variable: str, environment: Mapping[str, str]) -> int | None:
    """A flag's number, or else that of an environment variable."""
    if value is not None or variable not in environment:
        return value
    try:
        return int(environment[variable])
    except ValueError:
        raise ValueError(f"{variable} must be a number, not {environment[variable]!r}") from None


def _checked(job: Job) -> Job:
    host, _, port = job.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator must be HOST:PORT, not {job.coordinator!r}")
    if job.num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1, not {job.num_processes}")
    if not 0 <= job.process_id < job.num_processes:
        raise ValueError(
            f"--process_id must be 0 to {job.num_processes - 1}, one for each of the "
            f"{job.num_processes} processes, not {job.process_id}"
        )
    return job


def join(job: Job | None, *, timeout: float = 300, heartbeat: int = 100) -> None:
    """Joins the others; to be called before anything else is asked of JAX.

    Where all is known, the processes first call the roll at the coordinator's port: if one does not
    come within its `initialization_timeout`, JAX (0.10.2) aborts all others and names none.

    Args:
      job: from `find_job`; None does nothing.
      timeout: seconds to wait for the others.
      heartbeat: seconds after which a silent process counts as dead, and all others end.

    Raises:
      NotJoined: not all came in time.
    """
    if job is None:
        return
    seconds = max(int(timeout), 1)
    settings = {"initialization_timeout": seconds, "heartbeat_timeout_seconds": heartbeat}
    if job.coordinator is not None:
        roll_call(job, timeout)
        jax.distributed.initialize(job.coordinator, job.num_processes, job.process_id, **settings)
        return
    notice = threading.Timer(
        max(seconds - 2, 1),
        lambda: print(
            f"error: not all processes joined within {seconds} s. The hosts whose logs do not end "
            "with this line are those that did not come: is the program running on every host, "
            "and does the network let them reach process 0?",
            file=sys.stderr,
            flush=True,
        ),
    )
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:
        raise NotJoined(f"no other processes were found ({error}): {HOW_TO_JOIN}") from None
    finally:
        notice.cancel()


def roll_call(job: Job, timeout: float) -> None:
    """Returns when all processes are there.

    Process 0 listens at the coordinator's port, the others tell it who they are; when all have, or
    the time is over, it tells them how it went, and leaves the port to JAX.

    Raises:
      NotJoined: processes are missing (says which), came twice, or think that there are more or
        fewer than process 0 does.
    """
    host, _, port = job.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if job.process_id == 0:
        problem = _call(job, int(port), deadline, timeout)
    else:
        problem = _answer(job, (host.strip("[]"), int(port)), deadline, timeout)
    if problem is not None:
        raise NotJoined(problem)


def _call(job: Job, port: int, deadline: float, timeout: float) -> str | None:
    """Process 0's part: waits for the others, and tells them what is wrong."""
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=ipv6, backlog=1024
        )
    except OSError as error:
        return (
            f"process 0 cannot listen at port {port} of {job.coordinator}: {error}; choose "
            "another port, or end the program that uses it"
        )
    came = {0: "this host"}  # hosts of the processes
    connections: list[socket.socket] = []
    problem = None
    with listener, contextlib.ExitStack() as stack:
        while problem is None and len(came) < job.num_processes:
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection, address = listener.accept()
            except TimeoutError:
                missing = _named(sorted(set(range(job.num_processes)) - came.keys()))
                problem = (
                    f"{missing} of {job.num_processes} did not come to {job.coordinator} within "
                    f"{timeout:g} s: look at what {missing} printed"
                )
                break
            stack.enter_context(connection)
            said = _read(connection, 5.0)
            if set(said) != {"process_id", "num_processes"}:
                continue  # not one of ours
            connections.append(connection)
            index, count = said["process_id"], said["num_processes"]
            host = address[0].removeprefix("::ffff:")  # an IPv4 address on an IPv6 socket
            if count != job.num_processes:
                problem = (
                    f"process {index} ({host}) was started with --num_processes {count}, "
                    f"process 0 with {job.num_processes}"
                )
            elif index in came:
                problem = f"process {index} came twice, from {came[index]} and from {host}"
            came[index] = host
        for connection in connections:
            with contextlib.suppress(OSError):
                _write(connection, {"problem": problem})
        for connection in connections:  # they hang up first, so that the port is free
            _read(connection, 5.0)
    return problem


def _answer(job: Job, address: tuple[str, int], deadline: float, timeout: float) -> str | None:
    """The part of the others: says that this process is there, and returns what is wrong."""
    while True:
        try:
            connection = socket.create_connection(address, timeout=5)
            break
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                return (
                    f"process 0 did not answer at {job.coordinator} within {timeout:g} s "
                    f"({error}): is it running, and may this host reach that port?"
                )
            time.sleep(0.2)
    with connection:
        _write(connection, {"process_id": job.process_id, "num_processes": job.num_processes})
        answer = _read(connection, timeout + 10)  # process 0 may have started later
    ended = f"process 0 at {job.coordinator} ended while it waited for the others"
    return answer.get("problem", ended)


def _write(connection: socket.socket, content: dict) -> None:
    connection.sendall(json.dumps(content).encode() + b"\n")


def _read(connection: socket.socket, seconds: float) -> dict:
    """One line of JSON; empty if none comes."""
    connection.settimeout(seconds)
    try:
        content = json.loads(connection.makefile("rb").readline(4096))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _named(processes: list[int], limit: int = 16) -> str:
    names = ", ".join(map(str, processes[:limit]))
    more = f" and {len(processes) - limit} more" if len(processes) > limit else ""
    return f"process{'es' if len(processes) > 1 else ''} {names}{more}"


def barrier(name: str) -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_true(value: bool) -> bool:
    """Whether it is true on all processes; the same answer on all."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.int32(value)).all())


def from_main(values: list[int], limit: int = 4096) -> list[int]:
    """Process 0's numbers (int32, at least 0; the last `limit` of them)."""
    if jax.process_count() == 1:
        return values
    padded = np.full(limit, -1, np.int32)
    values = values[-limit:]
    padded[: len(values)] = values
    return [int(v) for v in multihost_utils.broadcast_one_to_all(padded) if v >= 0]


def check_same(what: str, text: str) -> None:
    """Checks that all processes were started with the same text.

    Raises:
      ValueError: on all of them; names those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.int32)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    differ = [i for i, other in enumerate(digests) if not np.array_equal(other, digests[0])]
    if differ:
        raise ValueError(
            f"{_named(differ)} of {jax.process_count()}: {what} differs from that of process 0; "
            "start the same command with the same files on every host"
        )


def check_shared(folder: epath.Path, patience: float = 60) -> None:
    """Creates a folder, and checks that all processes mean the same one.

    Args:
      folder: of a run.
      patience: seconds for which a network file system may remember that a file is not there.

    Raises:
      ValueError: on all of them; says what was expected.
    """
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if jax.process_count() == 1:
        return
    (token,) = from_main([secrets.randbelow(2**31)])
    file = folder / f".shared.{token}"
    if jax.process_index() == 0:
        file.write_text("all processes must see this file")
    barrier("shared folder: written")
    deadline = time.monotonic() + patience
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    shared = all_true(seen)
    if jax.process_index() == 0:
        file.unlink()
    if not shared:
        raise ValueError(
            f"{folder} is not the same folder on all hosts: what process 0 writes there does not "
            "appear on others. Use a network file system that all of them mount, or object storage"
        )


def explained(error: Exception, name: str) -> Exception:
    """The error that ends the process `name` of several, as it is to be raised.

    What a lost process looks like to the others depends on where they meet it: an error of the
    runtime, with gloo a ValueError from a computation.
    """
    text = str(error)[:1000]
    lost = isinstance(error, jax.errors.JaxRuntimeError) or any(w in text for w in _CONNECTION)
    if not lost or "RESOURCE_EXHAUSTED" in text:
        error.add_note(f"in {name}")
        return error
    return ProcessLost(
        f"{name}: a collective operation failed, most likely because another process has ended: "
        f"what that one printed says why. Here it was: {text}"
    )


def end(status: int) -> NoReturn:
    """Exits; after a failure without waiting for the others, who would wait for this process."""
    if status not in (0, NOT_JOINED) and jax.process_count() > 1:
        leave(status)  # not joined, JAX must not be asked for other processes
    sys.exit(status)


def leave(status: int) -> NoReturn:
    """Ends this process at once.

    After a failure of its own, a process that ended in the ordinary way would wait minutes for
    others which wait for it in a collective operation.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_count() > 1 and jax.process_index() == 0:
        time.sleep(3)  # the others lose their coordinator; where all fail, let them say why
    os._exit(status)


class Watchdog:
    """Ends a process in which nothing has moved for too long; a context manager.

    A lost host is JAX's to notice. A process that hangs, in a collective operation that another one
    never enters or in a file system that does not answer, keeps its heartbeat: it is ended here,
    with the stacks of its threads, so that the job ends and can be started again.

    It goes by the monotonic clock: setting the date does nothing.

    Args:
      seconds: that may pass between two calls of `alive`; 0: any time may.
      name: of the process in the message.
      end: called after the message, with the exit status.
      file: for the message and the stacks; None: standard error.
    """

    def __init__(
        self,
        seconds: float,
        *,
        name: str = "this process",
        end: Callable[[int], None] = os._exit,
        file: IO[str] | None = None,
    ):
        if not 0 <= seconds <= threading.TIMEOUT_MAX / 10:
            raise ValueError(f"watchdog: seconds must be 0 (off) or more, not {seconds}")
        self._seconds, self._name, self._end, self._file = seconds, name, end, file
        self._timer = threading.Timer(0, lambda: None)  # of the current wait
        self._open = False

    def __enter__(self) -> "Watchdog":
        self._open = self._seconds > 0
        self.alive("the start", patience=4)
        return self

    def __exit__(self, *exception) -> None:
        self._open = False
        self._timer.cancel()

    def alive(self, what: str, patience: float = 1.0) -> None:
        """Says that something was done, and that the next may take `patience` times as long."""
        self._timer.cancel()
        if self._open:
            seconds = self._seconds * patience
            self._timer = threading.Timer(seconds, self._bark, (what, seconds))
            self._timer.daemon = True
            self._timer.start()

    def _bark(self, last: str, seconds: float) -> None:
        file = self._file or sys.stderr
        print(
            f"error: {self._name} on {socket.gethostname()} hangs: nothing was done for "
            f"{seconds:g} s since {last}. It ends with status {HUNG}; started again, "
            "the run goes on from its last checkpoint. What its threads were doing:",
            file=file,
            flush=True,
        )
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.flush()
        self._end(HUNG)
