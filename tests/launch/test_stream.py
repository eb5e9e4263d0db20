"""`launch/stream.py` as a person runs it: clips, prompts, pipes, Ctrl-C, and refused input."""

import dataclasses
import errno
import fcntl
import io
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_converters import lora, ltx2, omniforcing, synthetic, tiny_decoder
from checkpoint_converters.shapes import model_shapes
from launch import sample_teacher, serve, stream
from launch.stream_report import StreamReport
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.tiny_decoder import TinyDecoderConfig
from omniforcing_jax.pipeline import PipelineConfig, load_pipeline
from omniforcing_jax.sampling.flow import student_sigmas
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.sampling.weights import per_layer
from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.background import BackgroundWriter
from omniforcing_jax.streaming.session import Chunk, StreamingSession
from omniforcing_jax.text import encoder_files
from omniforcing_jax.text import features as text_features
from omniforcing_jax.text.text_encoder import TextEncoder
from omniforcing_jax.training.source_model import SourceModel
from tests.checkpoint_converters.files import write_file

SIZE = ["--height", "64", "--width", "64", "--decode", "causal", "--sigmas", "1", "0.7", "0"]
SIZE += ["--bidirectional"]


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


def check(checkpoint, *more, **changes):
    config = dataclasses.replace(PipelineConfig.from_checkpoint(checkpoint), **changes)
    return stream.check_arguments(stream.parse_arguments(arguments(checkpoint, "-", *more)), config)


def test_clip_with_two_prompts(checkpoint, tmp_path, capsys):
    first = write_features(tmp_path / "first.safetensors", "a calm sea")
    second = write_features(tmp_path / "second.safetensors", "a storm")
    clip = tmp_path / "clip.mp4"
    more = ["--seconds", "2", "--features", first, f"{second}@1"]
    assert stream.main(arguments(checkpoint, clip, *more)) == 0
    frames, rate, waveform, sample_rate = media.read_clip(clip)
    # two seconds of each, give or take one AAC frame of padding
    assert frames.shape == (48, 64, 64, 3) and rate == pytest.approx(24, rel=0.01)
    assert sample_rate == 24000 and 0 <= len(waveform) - 48000 <= 1024
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


def sentences(gemma, cache, *prompts):
    more = ["--text-encoder", str(gemma), "--prompt-cache", str(cache), "--text-length", "128"]
    return [*more, "--seconds", "2", "--prompt", *prompts]


def test_clip_of_sentences(checkpoint, random_gemma, tmp_path, capsys, monkeypatch):
    """Encoded and unloaded before the sampler is loaded; then from the cache, without Gemma.

    A block that is begun before the one before it is copied has the same bits as one by one.
    """
    events = []

    def recorded(owner, name, event):
        original = getattr(owner, name)

        def call(*args, **options):
            events.append(event)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    recorded(TextEncoder, "load", "load encoder")
    recorded(TextEncoder, "close", "close encoder")
    recorded(stream, "load_pipeline", "load sampler")
    recorded(StreamReport, "chunk", "chunk")
    recorded(StreamingSession, "begin", "begin")
    clip = tmp_path / "clip.mp4"
    more = sentences(random_gemma, tmp_path / "cache", "a calm sea", "a storm@1")
    assert stream.main(arguments(checkpoint, clip, *more)) == 0
    assert events[:3] == ["load encoder", "close encoder", "load sampler"]
    assert events[3:7] == ["begin", "begin", "chunk", "begin"], "one is made while one is copied"
    report = capsys.readouterr().err
    assert "2 encoded, 0 from the cache" in report
    assert re.search(r"first chunk after.* s \(compilation [0-9.]+, text [0-9.]+, device", report)
    frames, *_ = media.read_clip(clip)
    assert frames.shape == (48, 64, 64, 3)

    events.clear()
    monkeypatch.setattr(TextEncoder, "load", lambda *a, **k: pytest.fail("weights were read"))
    again = tmp_path / "again.mp4"
    assert stream.main(arguments(checkpoint, again, *more, "--timings")) == 0
    assert events[:4] == ["load sampler", "begin", "chunk", "begin"]
    report = capsys.readouterr().err
    assert "0 encoded, 2 from the cache" in report
    assert re.search(r"block    1 .* s  \(generate [0-9.]+, video [0-9.]+, sound", report)
    assert again.read_bytes() == clip.read_bytes()


def test_kept_encoder(checkpoint, random_gemma, tmp_path, capsys, monkeypatch):
    """Later sentences are encoded when they are due, by the same encoder, as int8; the sampler's
    products and its cache are in 8 bits, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    more = sentences(random_gemma, "none", "a calm sea", "a storm@1")
    more += ["--keep-encoder", "--quantize-encoder", "int8", "--quantize", "w8a8-int8"]
    more += ["--cache-dtype", "int8"]
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", *more)) == 0
    report = capsys.readouterr().err
    assert "1 encoded, 0 from the cache" in report  # before the stream began
    assert "as float32 and w8a8-int8 on" in report
    blocks = [line for line in report.splitlines() if line.startswith("block")]
    assert "text" in blocks[2] and "text" not in blocks[1]
    assert not (tmp_path / "user").exists()


def test_released_student(checkpoint, tmp_path):
    """Weights as OmniForcing releases them: their layout, sinks and steps are the defaults.

    The base's tiny decoder comes along, and is what decodes.
    """
    base, metadata = tmp_path / "base", checkpoints.load_config(checkpoint)["config"]
    shutil.copytree(checkpoint, base)
    tiny = TinyDecoderConfig(metadata["vae"]["latent_channels"], (16, 8, 8, 8))
    rng = np.random.default_rng(0)
    weights = {
        key.removeprefix("tiny_decoder."): rng.standard_normal(shape, np.float32) / 8
        for key, shape in model_shapes("tiny_decoder", tiny).items()
    }
    tiny_decoder.add(write_file(tmp_path / "taeltx_2.safetensors", weights), base)
    source = next(pathlib.Path(checkpoint).parent.glob("*.safetensors"))
    prefix, weights = "model.diffusion_model.", load_file(source)
    student = {
        f"model.{key.removeprefix(prefix)}": value
        for key, value in weights.items()
        if key.startswith(prefix) and "connector" not in key
    }
    sinks = rng.standard_normal((1, 16, 32), np.float32)
    student["model.audio_sink_tokens"] = torch.from_numpy(sinks)
    save_file(student, tmp_path / "student.safetensors")
    converted = tmp_path / "student"
    inputs = ["--input", str(tmp_path / "student.safetensors"), "--base", str(base)]
    assert not omniforcing.main([*inputs, "--output", str(converted), "--num-heads", "4"])
    config = PipelineConfig.from_checkpoint(converted)
    assert config.transformer.rope_type == "interleaved"
    assert config.transformer.cross_gate_timestep_scale == 1
    more = ["--height", "64", "--width", "64", "--seconds", "1", "--random-features"]
    args = ["--checkpoint", str(converted), "--output", str(tmp_path / "clip.mp4"), *more]
    request = stream.check_arguments(stream.parse_arguments(args), config)
    assert request.rollout.num_steps == 3 and config.transformer.num_audio_sinks == 16
    assert request.rollout.cache.layout.name == "prefix"
    loaded = load_pipeline(converted, dtype=jnp.float32, tiny=True)
    assert "video_vae" not in loaded.params
    assert stream.main([*args, "--decode", "tiny"]) == 0
    frames, *_ = media.read_clip(tmp_path / "clip.mp4")
    assert frames.shape == (24, 64, 64, 3) and frames.std() > 1


def test_a_bidirectional_model_is_refused_unless_asked_for(checkpoint, tmp_path, capsys):
    args = [word for word in arguments(checkpoint, tmp_path / "x.mp4") if word != "--bidirectional"]
    assert stream.main([*args, "--random-features"]) == 2
    error = capsys.readouterr().err
    assert "is bidirectional and was not trained to be streamed" in error
    assert "--bidirectional" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_as_trained_unless_told_otherwise_and_that_is_said(checkpoint):
    trained = TrainedSettings(
        layout="merged", timesteps=(1000, 500), window=2, text_length=48, frame_rate=25.0,
        height=64, width=96,
    )  # fmt: skip

    def request(*more):
        config = dataclasses.replace(PipelineConfig.from_checkpoint(checkpoint), trained=trained)
        given = ["--checkpoint", checkpoint, "--output", "-", "--random-features", *more]
        args = stream.parse_arguments(given)
        return args, stream.check_arguments(args, config)

    args, found = request()
    assert (args.height, args.width, args.fps, found.notes) == (64, 96, 25, [])
    cache = found.rollout.cache
    assert (cache.layout, cache.window) == (BlockLayout.merged(frame_rate=25), 2)
    assert found.rollout.sigmas == tuple(student_sigmas((1000, 500)).tolist())
    assert request("--height", "64", "--window", "2")[1].notes == []
    more = ["--width", "128", "--window", "3", "--sigmas", "1", "0", "--decode", "causal"]
    assert request(*more)[1].notes == [
        "otherwise than the model was trained: --width 128, not 96; --window 3, not 2; --sigmas 1 "
        f"0, not 1 {found.rollout.sigmas[1]:g} 0; --decode causal, not window"
    ]


def test_prompts_may_end_like_times():
    """The first is read as it stands; those behind it have a time, so the last @ is that."""

    def turns(*more):
        given = ["--checkpoint", "x", "--output", "-", *more]
        return stream.turns(stream.parse_arguments(given))

    assert turns() == [(0, "")]
    assert turns("--prompt", "mail me @50") == [(0, "mail me @50")]
    assert turns("--prompt", "a sign that reads @9", "a storm@1.5", "a sign reads @9@3") == [
        (0, "a sign that reads @9"), (1.5, "a storm"), (3, "a sign reads @9"),
    ]  # fmt: skip
    more = ["--at", "9", "mail me @50", "--at", "12", "a storm"]
    assert turns("--prompt", "sea", *more) == [(0, "sea"), (9, "mail me @50"), (12, "a storm")]


@pytest.mark.parametrize(
    "seconds, rate, frames, blocks, note",
    [
        ("2", "24", 48, 3, None),
        ("2", "25", 50, 4, None),
        ("3.3", "30", 99, 6, None),
        ("3.3", "24", 79, 5, "79 frames are 3.292 s, not 3.3 s"),
        ("5.05", "20", 101, 6, None),
        # as many frames as six blocks have, whose sound is 30 ms shorter
        ("5.0416667", "24", 121, 7, None),
        ("0.001", "24", 1, 2, "1 frames are 0.042 s, not 0.001 s"),
    ],
)
def test_lengths_are_exact(checkpoint, seconds, rate, frames, blocks, note):
    request = check(checkpoint, "--random-features", "--seconds", seconds, "--fps", rate)
    samples = round(frames / float(rate) * 24000)
    assert request.length == (blocks, frames, samples)
    layout = request.rollout.cache.layout
    assert layout.pixel_frames(blocks) >= frames
    assert (4 * layout.num_audio_frames(blocks) - 3) * 240 >= samples
    assert [n for n in request.notes if "frames are" in n] == ([note] if note else [])


def test_a_turn_that_waits_for_its_block_is_announced(checkpoint):
    more = ["--random-features", "--prompt", "sea", "--at", "1.2", "storm", "--at", "3", "calm"]
    request = check(checkpoint, *more)
    assert sorted(request.prompts) == [0, 3, 4]
    assert request.notes[1:] == ["'storm' starts with its block, at 2.04 s, not 1.2 s"]


def test_a_reader_that_has_stalled_is_left_at_once(checkpoint):
    """The first signal ends the stream, whose last bytes nobody takes; the second does not wait."""
    process, _ = endless_stream(checkpoint, pipe_bytes=4096)
    process.send_signal(signal.SIGTERM)
    while b"ending after this block" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read()
    assert process.wait(timeout=240) == 130, errors.decode()[-2000:]
    assert errors.endswith(b"interrupted\n") and b"Traceback" not in errors
    process.stdout.close()


def test_a_second_signal_ends_what_python_cannot(tmp_path):
    """Such as a compilation: no handler runs before it returns."""
    code = (
        "import hashlib\n"
        "from launch.interrupt import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        "    interrupt.ends_after_block = True\n"
        "    interrupt.before_exit = lambda: print('cleared', flush=True)\n"
        "    print('begun', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, output) == (143, b"cleared\n") and b"Traceback" not in errors


def test_leaving_needs_nobody_who_listens():
    """What comes before the end may fail, and standard error be closed or a pipe that is full."""
    code = (
        "import os, signal\n"
        "from launch.interrupt import Interrupt\n"
        "def broken(interrupt):\n"
        "    interrupt.before_exit = lambda: 1 / 0\n"
        "def closed(interrupt):\n"
        "    os.close(2)\n"
        "def full(interrupt):\n"
        "    reader, writer = os.pipe()\n"
        "    os.set_blocking(writer, False)\n"
        "    try:\n"
        "        while True: os.write(writer, b'x' * 4096)\n"
        "    except BlockingIOError: os.set_blocking(writer, True)\n"
        "    os.dup2(writer, 2)\n"
        "for harm in (broken, closed, full):\n"
        "    if not (child := os.fork()):\n"
        "        signal.alarm(240)\n"
        "        interrupt = Interrupt()\n"
        "        harm(interrupt)\n"
        "        interrupt.leave()\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["130"] * 3, done.stderr


def test_ctrl_c_before_the_stream_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "load_pipeline", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", "--random-features")) == 130
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err.endswith("interrupted\n")


def endless_stream(checkpoint, pipe_bytes=None):
    """A process that writes a clip to a pipe, and what it has written until it was under way."""
    command = [sys.executable, "-m", "launch.stream", *arguments(checkpoint, "-"), "--endless"]
    process = subprocess.Popen(
        [*command, "--random-features"], bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if pipe_bytes:
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, pipe_bytes)
    head = b""
    while len(head) < 20000:
        piece = process.stdout.read(4096)
        assert piece, process.stderr.read().decode()[-2000:]
        head += piece
    return process, head


def test_ctrl_c_ends_an_endless_stream_properly(checkpoint):
    process, head = endless_stream(checkpoint)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()[-2000:]
    frames, *_ = media.read_clip(io.BytesIO(head + rest))
    assert len(frames) % 24 == 1 and len(frames) >= 25
    assert b"ending after this block" in errors


@pytest.mark.slow
def test_a_player_that_is_closed_ends_the_stream_quietly(checkpoint):
    process, _ = endless_stream(checkpoint)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=240) == 0, errors[-2000:]
    assert "first chunk after" in errors
    assert "Traceback" not in errors and "Broken" not in errors


@pytest.mark.parametrize(
    "error, status, message",
    [
        (
            OSError(errno.ENOSPC, "no space left"),
            1,
            "make room, or write to another place\nthe unfinish",
        ),
        (BrokenPipeError(errno.EPIPE, "no reader"), 0, "first chunk after"),
    ],
)
@pytest.mark.parametrize("method", ["_encode_chunk", "_finish"])
def test_errors_of_writing(
    checkpoint, tmp_path, monkeypatch, capsys, error, status, message, method
):
    """While the clip is being written, and when its end is."""
    write = getattr(media.ClipWriter, method)

    def fail(clip, *args, **options):
        if clip.frame_count:  # there is an unfinished clip
            raise error
        return write(clip, *args, **options)

    monkeypatch.setattr(media.ClipWriter, method, fail)
    more = ["--random-features", "--seconds", "2"]
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", *more)) == status
    assert message in capsys.readouterr().err


def test_a_second_ctrl_c_ends_the_stream_at_once(checkpoint, tmp_path, monkeypatch, capsys):
    begin = StreamingSession.begin

    def interrupted(session):
        for _ in range(2 * (session.num_blocks == 2)):  # the first is written then
            signal.raise_signal(signal.SIGINT)
        return begin(session)

    monkeypatch.setattr(StreamingSession, "begin", interrupted)
    more = ["--random-features", "--seconds", "2"]
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", *more)) == 130
    report = capsys.readouterr().err
    assert "ending after this block" in report and "the unfinished clip is in" in report
    assert media.read_clip(tmp_path / "clip.mp4")[0].shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--height", "100"], "multiples of 32"),
        (["--look-back", "-1"], "look_back must be an integer >= 0"),
        (["--look-ahead", "-1"], "look_ahead must be an integer >= 0"),
        (["--decode", "tiny"], "python -m checkpoint_converters.tiny_decoder adds one"),
        (["--blend", "-1"], "blend must be an integer >= 0"),
        (["--attention", "cudnn"], "needs an NVIDIA GPU"),
        (["--fps", "300"], "frame_rate must be from 1 to 240"),
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
        (["--features", "a.safetensors", "--random-features"], "found --features and --random-f"),
        (["--features", "a.safetensors", "--prompt", "x"], "goes with --text-encoder or --random"),
        (["--text-encoder", "GEMMA"], "needs --prompt TEXT"),
        (["--text-encoder", "GEMMA", "--prompt", "x", "--features", "y"], "one source of text"),
        (["--text-encoder", "nowhere", "--prompt", "x"], "nowhere does not exist"),
        (["--text-encoder", "GEMMA/../hf", "--prompt", "x"], "is a Hugging Face folder; convert"),
        (["--text-encoder", "GEMMA", "--prompt", "a\udce4"], "is not valid Unicode"),
        (["--text-encoder", "GEMMA", "--prompt", "x", "y"], "'y' has no time to start at"),
        (["--prompt", "x", "--at", "soon", "y"], "--at soon 'y': 'soon' is not a number"),
        (["--prompt", "x", "--at", "nan", "y"], "a second from 0 on, not nan"),
        (["--prompt", "x", "--at", "0", "y"], "starts in the same second as 'x'"),
        (["--text-encoder", "GEMMA", "--prompt", "x", "y@-1"], "a second from 0 on, not -1"),
        (["--text-encoder", "GEMMA", "--prompt", "x", "y@1", "z@0.9"], "same second as 'y'"),
        (["--text-encoder", "GEMMA", "--prompt", "x", "y@9"], "starts after the end of the clip"),
        (["--lora", "GEMMA/../hf"], "is a Gemma 3, the text encoder of LTX-2.0 and 2.3; python"),
        (["--keep-encoder"], "--keep-encoder has no effect without --text-encoder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    checkpoint, random_gemma, tmp_path, monkeypatch, capsys, change, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream, "load_pipeline", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.setattr(TextEncoder, "load", lambda *a, **k: pytest.fail("weights were read"))
    change = [word.replace("GEMMA", str(random_gemma)) for word in change]
    if "--text-encoder" in change:
        more = [*change, "--prompt-cache", "none"]
    else:
        more = change if "--features" in change else ["--random-features", *change]
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_loras_are_added_before_weights_are_quantised(checkpoint, tmp_path):
    synthetic.write_lora(tmp_path / "style.safetensors", "tiny", "2.0")
    metadata = checkpoints.load_config(checkpoint)["config"]
    loras, _ = lora.updates([(tmp_path / "style.safetensors", 0.5)], metadata)
    how = {"dtype": jnp.float32, "loras": loras}
    merged = load_pipeline(checkpoint, **how, per_layer=False).params["transformer"]
    expected = per_layer(merged, quantize="int8")
    found = load_pipeline(checkpoint, **how, quantize="int8").params["transformer"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found["blocks"][1]["video_ff"]["up"]["kernel"].values.dtype == jnp.int8
    with pytest.raises(ValueError, match="quantize must be one of none, int8, fp8, w8a8-int8"):
        load_pipeline(checkpoint, **how, quantize="int4")
    with pytest.raises(ValueError, match="'int8' is for streaming: leave per_layer as it is"):
        load_pipeline(checkpoint, **how, quantize="int8", per_layer=False)


def test_loras_are_added_to_the_weights(checkpoint, random_gemma, tmp_path, monkeypatch, capsys):
    """Of a stream, and of the server's model."""
    synthetic.write_lora(tmp_path / "style.safetensors", "tiny", "2.0")

    def load(folder, **how):
        models = [load_pipeline(folder, **how), load_pipeline(folder, **how | {"loras": ()})]
        models = [model.params["transformer"] for model in models]
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), *models)
        raise ValueError(f"{sum(jax.tree.leaves(changed))} leaves changed")

    monkeypatch.setattr(stream, "load_pipeline", load)
    more = ["--random-features", "--lora", f"{tmp_path / 'style.safetensors'}:0.5"]
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", *more)) == 2
    said = capsys.readouterr().err
    assert "merged: style.safetensors, strength 0.5, 48 layers" in said
    assert "36 leaves changed" in said  # of each layer 24, some of them joined, makes 18
    config = PipelineConfig.from_checkpoint(checkpoint)
    student = dataclasses.replace(
        config, trained=dataclasses.replace(config.trained, layout="prefix")
    )
    monkeypatch.setattr(PipelineConfig, "from_checkpoint", lambda folder: student)
    sizes = ["--height", "64", "--width", "64", "--prompt-cache", "none"]
    served = ["--checkpoint", checkpoint, "--text-encoder", str(random_gemma), *more[1:], *sizes]
    request = serve.check_arguments(serve.parse_arguments(served))
    assert request.loras


@pytest.fixture(scope="module")
def partial_checkpoint(checkpoint, tmp_path_factory):
    """Made with --components transformer connectors."""
    folder = tmp_path_factory.mktemp("partial") / "checkpoint"
    source = next(pathlib.Path(checkpoint).parent.glob("*.safetensors"))
    ltx2.convert(source, folder, components=("transformer", "connectors"))
    return str(folder)


@pytest.mark.parametrize("program", [stream, sample_teacher])
def test_a_checkpoint_that_lacks_components_is_refused(
    checkpoint, partial_checkpoint, tmp_path, monkeypatch, capsys, program
):
    monkeypatch.setattr(
        checkpoints, "load_params", lambda *a, **k: pytest.fail("weights were read")
    )
    options = ["--output", str(tmp_path / "clip.mp4"), "--random-features"]
    options += ["--height", "64", "--width", "64"]
    assert program.main(["--checkpoint", partial_checkpoint, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the checkpoint has no video_vae, audio_vae, vocoder, so nothing"
    )
    assert "convert again with all components" in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="has no video_vae, audio_vae, vocoder, so nothing"):
        load_pipeline(partial_checkpoint, dtype=jnp.float32)
    assert not list(tmp_path.iterdir())


def test_a_component_whose_folder_is_gone_is_missing_as_well(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    assert PipelineConfig.from_checkpoint(tmp_path / "checkpoint").missing == ()
    shutil.rmtree(tmp_path / "checkpoint" / "vocoder")
    with pytest.raises(
        ValueError, match="the checkpoint has no vocoder, so nothing can be sampled"
    ):
        load_pipeline(tmp_path / "checkpoint", dtype=jnp.float32)


def test_who_samples_nothing_takes_fewer_components(checkpoint, partial_checkpoint, random_gemma):
    """Training reads the description and the transformer, the prompt encoder the connectors."""
    whole = PipelineConfig.from_checkpoint(checkpoint)
    part = PipelineConfig.from_checkpoint(partial_checkpoint)
    assert dataclasses.replace(part, missing=()) == whole
    encoder_files.check_encoder(random_gemma, partial_checkpoint)
    assert SourceModel.find(partial_checkpoint, None, None).config.transformer == whole.transformer


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (FileNotFoundError("checkpoint has no transformer"), 2, "checkpoint has no transformer"),
        (ValueError("checkpoint: format 2"), 2, "checkpoint: format 2"),
        (OSError(errno.ENOSPC, "no space left"), 1, "No space left on device; make room"),
    ],
)
def test_errors_of_the_teacher_after_its_checks(
    checkpoint, tmp_path, monkeypatch, capsys, error, status, text
):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(sample_teacher, "load_pipeline", fail)
    options = ["--output", str(tmp_path / "clip.mp4"), "--random-features", "--stg-block", "1"]
    options += ["--height", "64", "--width", "64"]
    assert sample_teacher.main(["--checkpoint", checkpoint, *options]) == status
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {text}")
    assert not list(tmp_path.iterdir())


def test_missing_pyav_is_found_before_anything_is_loaded(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "load_pipeline", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.setitem(sys.modules, "av", None)
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", "--random-features")) == 2
    assert "needs PyAV (pip install av)" in capsys.readouterr().err


def test_unknown_attention_is_refused(checkpoint, capsys):
    with pytest.raises(SystemExit):
        stream.parse_arguments(arguments(checkpoint, "-", "--attention", "flash"))
    assert "invalid choice: 'flash'" in capsys.readouterr().err


def test_window_decode_is_refused_for_a_causal_decoder(checkpoint):
    causal = dataclasses.replace(
        PipelineConfig.from_checkpoint(checkpoint).video_vae, causal_decoder=True
    )
    check(checkpoint, "--random-features", video_vae=causal)
    with pytest.raises(ValueError, match="trained causal"):
        check(checkpoint, "--random-features", "--decode", "window", video_vae=causal)


def test_padding_of_stored_features_is_left_out(checkpoint, tmp_path):
    """The tokens that the mask hides would be attended to otherwise."""
    path, rng = tmp_path / "padded.safetensors", np.random.default_rng(0)
    video, audio = rng.normal(size=(2, 1, 6, 32)).astype(np.float32)
    mask = np.array([[True, True, False, True, False, False]])
    text_features.save_text_features(path, video, audio, "a calm sea", "2.0.0", mask)
    request = check(checkpoint, "--features", str(path))
    for context, stored in zip(request.prompts[0], (video, audio), strict=True):
        np.testing.assert_array_equal(context, stored[:, [0, 1, 3]])
    # prompts of other lengths share a program, but one of them needs no padding
    other = write_features(tmp_path / "other.safetensors", "a storm")
    both = check(checkpoint, "--features", str(path), "--at", "2", other).prompts.values()
    assert stream.padded_length(both, "auto") == 128
    assert stream.padded_length(request.prompts.values(), "auto") is None


@pytest.mark.parametrize(
    "batch, mask, message",
    [(2, None, "holds 2 prompts"), (1, np.zeros((1, 6), bool), "leaves no token to attend to")],
)
def test_features_that_are_no_prompt_are_refused(checkpoint, tmp_path, batch, mask, message):
    path, contexts = tmp_path / "odd.safetensors", np.ones((batch, 6, 32), np.float32)
    text_features.save_text_features(path, contexts, contexts, "a calm sea", "2.0.0", mask)
    with pytest.raises(ValueError, match=message):
        check(checkpoint, "--features", str(path))


def test_features_of_another_model_are_refused(checkpoint, tmp_path, capsys):
    wide = write_features(tmp_path / "wide.safetensors", "a calm sea", width=48)
    clip = tmp_path / "clip.mp4"
    assert stream.main(arguments(checkpoint, clip, "--features", wide)) == 2
    error = capsys.readouterr().err
    assert "48" in error and "32" in error and not clip.exists()


def test_gemma_of_another_model_is_refused(checkpoint, random_gemma, tmp_path, capsys):
    shutil.copytree(random_gemma, tmp_path / "gemma")
    config = tmp_path / "gemma" / "config.json"
    content = checkpoints.read_json(config)
    content["config"]["hidden_size"] = 48
    checkpoints.write_json(config, content)
    more = sentences(tmp_path / "gemma", tmp_path / "cache", "a calm sea")
    assert stream.main(arguments(checkpoint, tmp_path / "clip.mp4", *more)) == 2
    assert "of width 32, the text tower's have 48" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gemma"]


def test_existing_clip_is_kept(checkpoint, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"precious")
    assert stream.main(arguments(checkpoint, clip, "--random-features")) == 2
    assert "overwrite" in capsys.readouterr().err and clip.read_bytes() == b"precious"


def test_writer_errors_reach_the_main_thread():
    class Broken:
        def write(self, frames, waveform):
            raise OSError("disk full")

    writer = BackgroundWriter(Broken())
    chunk = Chunk(0, 0, 0, np.zeros((1, 1, 2, 2, 3), np.uint8), jnp.zeros((1, 0, 2)), None)
    writer.put(chunk)
    with pytest.raises(OSError, match="disk full"):
        writer.close()
