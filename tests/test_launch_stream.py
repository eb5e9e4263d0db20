"""`launch/stream.py` as a person runs it: clips, prompts, pipes, Ctrl-C, and refused input."""

import io
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_converters import omniforcing
from launch import stream
from omniforcing_jax import media, text_features
from omniforcing_jax.pipeline import PipelineConfig

SIZE = ["--height", "64", "--width", "64", "--decode", "causal", "--sigmas", "1", "0.7", "0"]


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint):
    return str(random_checkpoint("2.0"))


def arguments(checkpoint, output, *more):
    return ["--checkpoint", checkpoint, "--output", str(output), *SIZE, *more]


def write_features(path, prompt, width=32):
    key = text_features.prompt_key(prompt)
    features = text_features.random_text_features(key, 1, 128, (width, width))
    text_features.save_text_features(
        path, features.video_context, features.audio_context, prompt, "2.0.0"
    )
    return str(path)


def test_clip_with_two_prompts(checkpoint, tmp_path, capsys):
    first = write_features(tmp_path / "first.safetensors", "a calm sea")
    second = write_features(tmp_path / "second.safetensors", "a storm")
    clip = tmp_path / "clip.mp4"
    more = ["--seconds", "2", "--features", first, f"{second}@1"]
    assert stream.main(arguments(checkpoint, clip, *more)) == 0
    frames, rate, waveform, sample_rate = media.read_clip(clip)
    assert frames.shape == (49, 64, 64, 3) and rate == pytest.approx(24, rel=0.01)
    # 4 * 51 - 3 mel frames of 240 samples, give or take one AAC frame of padding
    assert sample_rate == 24000 and abs(len(waveform) - 201 * 240) <= 1024
    assert frames.std() > 1 and np.abs(waveform).max() > 0
    report = capsys.readouterr().err
    assert "block    1" in report and "FPS" in report and "lead" in report

    alone = tmp_path / "alone.mp4"
    more = ["--seconds", "2", "--features", first]
    assert stream.main(arguments(checkpoint, alone, *more)) == 0
    same, *_ = media.read_clip(alone)
    difference = np.abs(frames.astype(int) - same).mean(axis=(1, 2, 3))
    assert difference[:25].max() < 1  # the first second is the same, but for its encoding
    assert difference[30:].mean() > 5 * difference[:25].mean()


def test_released_student(checkpoint, tmp_path):
    """Weights as OmniForcing releases them: their layout, sinks and steps are the defaults."""
    source = next(pathlib.Path(checkpoint).parent.glob("*.safetensors"))
    prefix, weights = "model.diffusion_model.", load_file(source)
    student = {
        f"model.{key.removeprefix(prefix)}": value
        for key, value in weights.items()
        if key.startswith(prefix) and "connector" not in key
    }
    student["model.audio_sink_tokens"] = torch.randn(1, 16, 32)
    save_file(student, tmp_path / "student.safetensors")
    converted = tmp_path / "student"
    inputs = ["--input", str(tmp_path / "student.safetensors"), "--base", checkpoint]
    assert not omniforcing.main([*inputs, "--output", str(converted), "--num-heads", "4"])
    config = PipelineConfig.from_checkpoint(converted)
    assert config.transformer.rope_type == "interleaved"
    assert config.transformer.cross_gate_timestep_scale == 1
    more = ["--height", "64", "--width", "64", "--seconds", "1", "--random-features"]
    args = ["--checkpoint", str(converted), "--output", str(tmp_path / "clip.mp4"), *more]
    plan = stream.make_plan(stream.parse_arguments(args), config)
    assert plan.rollout.num_steps == 3 and plan.rollout.cache.layout.num_sinks == 16
    assert plan.rollout.cache.layout.name == "prefix"
    assert stream.main(args) == 0
    frames, *_ = media.read_clip(tmp_path / "clip.mp4")
    assert frames.shape == (25, 64, 64, 3)


def test_ctrl_c_ends_an_endless_stream_properly(checkpoint):
    command = [sys.executable, "-m", "launch.stream", *arguments(checkpoint, "-"), "--endless"]
    process = subprocess.Popen(
        [*command, "--random-features"], bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    head = b""
    while len(head) < 20000:  # until the clip is under way
        head += process.stdout.read(4096)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()[-2000:]
    assert time.monotonic() - started < 120
    frames, *_ = media.read_clip(io.BytesIO(head + rest))
    assert len(frames) % 24 == 1 and len(frames) >= 25
    assert b"ending after this block" in errors


@pytest.mark.parametrize(
    "change, message",
    [
        (["--height", "100"], "multiples of 32"),
        (["--height", "32"], "at least"),
        (["--seconds", "-1"], "seconds"),
        (["--fps", "23"], "frame rate"),
        (["--window", "0"], "window must be at least 1"),
        (["--sigmas", "1", "0.5"], "must end with 0"),
        (["--endless", "--positions", "absolute"], "positions='relative'"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--output", "/etc/passwd/clip.mp4"], "not a folder"),
        (["--output", "clip.avi"], "mp4"),
        (["--features", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    checkpoint, tmp_path, monkeypatch, capsys, change, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream, "load_pipeline", lambda *a, **k: pytest.fail("weights were read"))
    more = change if "--features" in change else ["--random-features", *change]
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_features_of_another_model_are_refused(checkpoint, tmp_path, capsys):
    wide = write_features(tmp_path / "wide.safetensors", "a calm sea", width=48)
    clip = tmp_path / "clip.mp4"
    assert stream.main(arguments(checkpoint, clip, "--features", wide)) == 2
    error = capsys.readouterr().err
    assert "48" in error and "32" in error and not clip.exists()


def test_existing_clip_is_kept(checkpoint, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"precious")
    assert stream.main(arguments(checkpoint, clip, "--random-features")) == 2
    assert "overwrite" in capsys.readouterr().err and clip.read_bytes() == b"precious"


def test_writer_errors_reach_the_main_thread():
    class Broken:
        def write(self, frames, waveform):
            raise OSError("disk full")

    writer = stream.BackgroundWriter(Broken())
    chunk = stream.Chunk(0, 0, 0, np.zeros((1, 1, 2, 2, 3), np.uint8), jnp.zeros((1, 0, 2)), None)
    writer.put(chunk)
    with pytest.raises(OSError, match="disk full"):
        writer.close()
