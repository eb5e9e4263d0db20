"""Two-stage sampling: small, upsampled, refined; through the program, and against its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from checkpoint_converters import ltx2, synthetic, upsampler
from launch import refinement, sample_teacher
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.io import checkpoints
from omniforcing_jax.sampling import flow, two_stage
from omniforcing_jax.sampling.teacher import Prompt, sample
from omniforcing_jax.sampling.two_stage import SECOND_STAGE_KEY, Upsampler, refine
from omniforcing_jax.streaming import media
from omniforcing_jax.types import AVLatents
from tests.tiny_model import random_contexts

CLIP = ClipGeometry(video_frames=2, audio_frames=9, height=4, width=4)


@pytest.fixture(scope="module")
def folders(random_checkpoint, tmp_path_factory):
    """The random checkpoint, a distilled model of other weights, and upsamplers for them."""
    base, folder = random_checkpoint("2.0"), tmp_path_factory.mktemp("two_stage")
    distilled = folder / "distilled"
    synthetic.write(folder / "other.safetensors", "tiny", "2.0", seed=1)
    ltx2.convert(folder / "other.safetensors", distilled, recipe="distilled")
    for kind in ("spatial", "temporal"):
        source = folder / f"{kind}.safetensors"
        synthetic.write_upsampler(source, "tiny", "2.0", kind)
        upsampler.convert(source, folder / kind)
    return base, distilled, folder / "spatial", folder / "temporal"


def test_refining_equals_its_steps(folders, random_pipeline):
    """Both streams are taken up at 0.909; the video moves, the sound stays that of the first."""
    pipeline = random_pipeline("2.0")
    model, params = pipeline.transformer(), pipeline.params["transformer"]
    prompt = Prompt(*random_contexts(model.config))
    up = Upsampler.find(folders[2], "2.0.0", model.config.video_channels)
    first = up.first_clip(CLIP)
    assert (first.height, first.width) == (2, 2)
    key = jax.random.key(3)
    noise = draw_noise(key[None], first, model)
    video = up(up.load(jnp.float32), pipeline.params["video_vae"], noise.video, first, jnp.float32)
    assert video.shape == (1, CLIP.video_tokens, model.config.video_channels)
    small = AVLatents(video, noise.audio)
    found = refine(model, params, prompt, key, small, CLIP)
    np.testing.assert_array_equal(found.audio, noise.audio)
    assert np.isfinite(np.asarray(found.video)).all()
    config = two_stage.SampleConfig(two_stage.REFINING, CLIP)
    again = jax.random.fold_in(key, SECOND_STAGE_KEY)
    visited = sample(model, params, prompt, None, again, config, initial=small, trajectory=True)
    start = draw_noise(jax.random.fold_in(again, 0)[None], CLIP, model)
    expected = jax.tree.map(
        lambda x0, n: flow.add_noise(x0, n, flow.DISTILLED_STAGE2_SIGMAS[0]), small, start
    )
    np.testing.assert_allclose(visited.audio[0], expected.audio, atol=1e-6)
    np.testing.assert_allclose(visited.video[-1], found.video, atol=1e-4)


def script(checkpoint, output, *options):
    arguments = ["--checkpoint", str(checkpoint), "--random-features", "--prompt", "a dog"]
    arguments += ["--frames", "9", "--height", "128", "--width", "128", "--dtype", "float32"]
    return sample_teacher.main([*arguments, "--output", str(output), *map(str, options)])


def test_program(folders, tmp_path, capsys, monkeypatch):
    """A full model's clip, which begins with a picture, is refined by a distilled one; nothing that
    is read for it is verified with --no-verify."""
    monkeypatch.setattr(checkpoints, "_verify", lambda path, *a: pytest.fail(f"{path}: verified"))
    calls = []

    def spy(model, params, prompt, key, first, clip, *, condition):
        calls.append((params, condition))
        return refine(model, params, prompt, key, first, clip, condition=condition)

    monkeypatch.setattr(refinement, "refine", spy)
    base, distilled, spatial, _ = folders
    output = tmp_path / "clip.mp4"
    plain = ["--steps=2", "--stg=0", "--modality=1", "--cfg-video=1", "--cfg-audio=1"]
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((128, 128, 3), 90, np.uint8)).save(picture)
    options = ["--upsampler", spatial, "--refiner", distilled, *plain, "--rescale=0"]
    options += ["--image", picture, "--crf=0", "--no-verify"]
    assert not script(base, output, *options)
    assert "upsampling, and refining in 3 steps" in capsys.readouterr().err
    frames = media.read_clip(output)[0]
    assert frames.shape == (9, 128, 128, 3)
    [(params, condition)] = calls
    for folder, same in ((distilled, True), (base, False)):
        how = {"dtype": jnp.float32, "verify": False}
        expected = checkpoints.load_params(folder, "transformer", **how)
        kernel, wanted = (t["blocks"]["video_attn"]["q"]["kernel"] for t in (params, expected))
        assert np.array_equal(kernel, wanted) == same
    assert condition is not None  # the picture, at the size that comes out
    assert condition.clean.video.shape[1] == CLIP.video_tokens
    np.testing.assert_array_equal(np.asarray(condition.mask.video)[0], [0, 1])


def test_program_refuses(folders, tmp_path, capsys, monkeypatch):
    base, distilled, spatial, temporal = folders
    monkeypatch.setattr(sample_teacher, "load_pipeline", lambda *a, **k: pytest.fail("weights"))

    def error(checkpoint, *options):
        assert script(checkpoint, tmp_path / "clip.mp4", *options) == 2
        return capsys.readouterr().err

    assert "is no distilled LTX-2" in error(base, "--upsampler", spatial, "--stg=0")
    assert "temporal upsampler, which doubles" in error(distilled, "--upsampler", temporal)
    assert "is no upsampler" in error(distilled, "--upsampler", base)
    assert "nothing to upsample" in error(
        distilled, "--upsampler", spatial, "--foley", "--video", tmp_path / "film.mp4"
    )
    assert "no effect without --upsampler" in error(distilled, "--refiner", distilled)
    message = error(distilled, "--upsampler", spatial, "--height", "96")
    assert "multiples of 2 latents (64 pixels), not 3x4" in message
    with pytest.raises(ValueError, match=r"for LTX-2 2\.0\.0's latents"):
        Upsampler.find(spatial, "2.3.0", 8)
    narrow = dataclasses.replace(CLIP, height=3)
    with pytest.raises(ValueError, match="not 3x4"):
        Upsampler.find(spatial, "2.0.0", 8).first_clip(narrow)
