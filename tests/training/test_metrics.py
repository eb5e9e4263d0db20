"""Records: means, files, console, speed."""

import io
import json
import struct
import types

import jax
import pytest
import rich.console

from omniforcing_jax.training import metrics
from omniforcing_jax.training.metrics import (
    Averages,
    MetricWriter,
    Stopwatch,
    console_line,
    is_band,
    read_records,
)


def test_averages_survive_json_exactly():
    first = Averages()
    first.add({"loss": 0.1, "band/low": float("nan")})
    first.add({"loss": 0.2, "critic": 1 / 3})
    second = Averages()
    second.set_state(json.loads(json.dumps(first.get_state())))
    for averages in (first, second):
        averages.add({"loss": 0.7})
    expected = {"critic": 1 / 3, "loss": (0.1 + 0.2 + 0.7) / 3}
    assert first.take() == second.take() == expected
    assert first.take() == {}
    assert is_band("band/critic_video_0-0.25") and not is_band("bandwidth/x")


def tensorboard_steps(folder) -> list[int]:
    """Steps of the records in TensorBoard's event files (length, crc, data, crc), in order."""
    from tensorboardX.proto.event_pb2 import Event

    steps = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            steps += [event.step] if event.HasField("summary") else []
            data = data[16 + length :]
    return steps


def test_files_and_what_a_restart_drops(tmp_path):
    text = io.StringIO()
    console = rich.console.Console(file=text, width=20)
    writer = MetricWriter(tmp_path, console=console)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 3})
    writer.say("a line that is longer than the console [is] wide: 0.5")
    writer.close()
    assert text.getvalue() == "a line that is longer than the console [is] wide: 0.5\n"
    assert tensorboard_steps(tmp_path / "tensorboard") == [10, 20, 30]
    file = tmp_path / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 40, "lo')
    assert [r["step"] for r in read_records(file)] == [10, 20, 30]

    writer = MetricWriter(tmp_path, start_step=20, tensorboard=False, console=console)
    assert [r["step"] for r in read_records(file)] == [10, 20]
    writer.write(30, {"loss": 1.0})
    writer.close()
    assert read_records(file)[-1] == {"step": 30, "loss": 1.0}
    file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON object: 'nonsense'"):
        read_records(file)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricWriter(tmp_path / "run")
    writer.write(1, {"loss": 1.0})
    writer.say("nothing")
    writer.close()
    assert not (tmp_path / "run").exists()


def test_console_line():
    scalars = {
        "band/generator_video_0-0.25": 1.0,
        "generator/grad_norm": 2.0,
        "generator/grad_norm/audio": 3.0,
        "generator/loss_audio": 0.123456,
        "speed/steps_per_second": 0.25,
        "speed/mfu": 0.4321,
    }
    assert console_line(1000, 2000, scalars) == (
        "step 1,000/2,000  generator/grad_norm 2  generator/loss_audio 0.1235  4 s/it  MFU 43.2%  "
        "ETA 1:06:40"
    )


def test_speed(monkeypatch):
    clock = iter((0.0, 1.0, 2.0, 3.0, 6.0, 7.0, 9.0, 10.0))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 4e12)
    watch = Stopwatch(flops_per_step=2e12, tokens_per_step=50)
    for what in ("data", "step", "other"):  # 1, 3 and 2 of 10 seconds
        with watch.measure(what):
            pass
    assert watch.read(5) == pytest.approx(
        {
            "speed/steps_per_second": 0.5,
            "speed/data_share": 0.1,
            "speed/host_share": 0.5,
            "speed/other_share": 0.2,
            "speed/tokens_per_second": 25.0,
            "speed/tflops_per_second": 1.0,
            "speed/mfu": 0.25 / jax.device_count(),
        }
    )


@pytest.mark.parametrize(
    ("kind", "count", "mfu"),
    [
        ("TPU7x", 2, 0.5),  # a chip of 2306 TFLOP/s is two devices
        ("TPU v5", 4, 1153 / 459 / 4),  # what a v5p calls itself
        ("NVIDIA H200", 1, 1153 / 989),
        ("cpu", 1, None),
    ],
)
def test_mfu_counts_the_devices_of_jax(kind, count, mfu, monkeypatch):
    clock = iter((0.0, 2.0))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: count)
    speed = Stopwatch(flops_per_step=1153e12).read(2)
    assert speed.get("speed/mfu") == (mfu and pytest.approx(mfu))


def test_memory_has_known_names():
    assert set(metrics.memory_use()) <= {"memory/in_use_gib", "memory/peak_gib"}
