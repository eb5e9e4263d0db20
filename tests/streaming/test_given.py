"""Streams of which something is given: it comes out as it went in, and they replay with it."""

import functools
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax import ClipGeometry, load_pipeline
from omniforcing_jax.encoding import MediaEncoder
from omniforcing_jax.geometry import modalities
from omniforcing_jax.sampling import student
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.streaming import given
from omniforcing_jax.streaming.given import unshown_blocks
from omniforcing_jax.types import AVLatents
from tests.tiny_model import random_latents

RATE = 24000
PIXELS = (64, 64)


@pytest.fixture(scope="module")
def pipeline(random_checkpoint):
    return load_pipeline(random_checkpoint("2.0"), dtype=jnp.float32, encoders=True)


def contexts(pipeline, seed=0, batch=1):
    keys = jax.random.split(jax.random.key(seed))
    dims = pipeline.config.transformer.text_dims
    return tuple(jax.random.normal(k, (batch, 16, d)) for k, d in zip(keys, dims, strict=True))


def session(pipeline, *, recache=True, anchors=1, layout="prefix", batch=1, **options):
    cache = CacheConfig(pipeline.config.layout(layout), window=2, anchors=anchors)
    config = RolloutConfig(cache, (1.0, 0.7, 0.0), 2, 2, recache=recache)
    prompt = contexts(pipeline, batch=batch)
    return pipeline.session(config, prompt, decode_mode="causal", **options)


def sound(seconds, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.5, 0.5, (1, round(seconds * RATE), 2)).astype(np.float32)


def film(count, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (1, count, 2, 2, 3), dtype=np.uint8)
    return coarse.repeat(PIXELS[0] // 2, axis=2).repeat(PIXELS[1] // 2, axis=3)


def picture(seed=0):
    return film(1, seed)[0, 0].astype(np.float32) / 127.5 - 1


def join(chunks):
    frames = np.concatenate([c.frames for c in chunks], axis=1)
    return frames, np.concatenate([c.waveform for c in chunks], axis=1)


def probe_of(live):
    return random_latents(live._blocks.model.config, 3 * 4, 25, seed=3)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def seen(params, cache, rope, text, probe, *, model, config):
    """Prediction of x0 of a later block with this cache."""
    forward = student.bind(model, params, cache, rope, config, first=False)
    return forward(probe, jnp.float32(0.6), text)[0]


def next_block(live, cache):
    """What the next block, made from a probe, sees in a cache."""
    arguments = live._blocks.params, cache, live._blocks.rope, live._steering.text, probe_of(live)
    return seen(*arguments, model=live._blocks.model, config=live.config)


def held_blocks(live):
    """Conditions of the blocks that the cache holds, their latents all clean."""
    return [condition for _, condition in sorted(live._blocks.held.items())]


def check_cache(live, contexts, held):
    """The next block sees what one uncached, masked pass over the held blocks would show it."""
    model, params, layout = live._blocks.model, live._blocks.params, live.config.cache.layout
    clip = ClipGeometry.from_blocks(layout, held + 1, 2, 2)
    probe = probe_of(live)
    cleans = [condition.clean for condition in held_blocks(live)]
    assert len(cleans) == held
    x = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *cleans, probe)
    sigma = AVLatents(
        jnp.zeros((1, clip.video_frames)).at[:, -3:].set(0.6),
        jnp.zeros((1, clip.audio_frames)).at[:, -25:].set(0.6),
    )
    streams = modalities(x, sigma, clip.stream_ropes(model), contexts)
    whole = model.clone(causal=clip.mask(layout))
    (video, audio), _ = jax.jit(whole.apply)({"params": params}, *streams)
    found = next_block(live, live._blocks.cache)
    expected = probe.video - 0.6 * video[:, -12:], probe.audio - 0.6 * audio[:, -25:]
    np.testing.assert_allclose(found.video, expected[0], atol=2e-5)
    np.testing.assert_allclose(found.audio, expected[1], atol=2e-5)


def check_keys(live, contexts):
    """The cache, nothing evicted, is what one uncached, masked pass makes of its blocks.

    Unlike `check_cache` of any version: all tokens of the pass have one noise level, 0.
    """
    layout, model = live.config.cache.layout, live._blocks.model
    cleans = [condition.clean for condition in held_blocks(live)]
    assert len(cleans) == live.num_blocks == live.config.cache.capacity
    clip = ClipGeometry.from_blocks(layout, len(cleans), 2, 2)
    clean = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *cleans)
    level = jnp.zeros((live._batch, 1))
    streams = modalities(clean, AVLatents(level, level), clip.stream_ropes(model), contexts)
    whole = model.clone(causal=clip.mask(layout), return_kv=True)
    _, kv = jax.jit(whole.apply)({"params": live._blocks.params}, *streams)
    for found, expected in zip(
        jax.tree.leaves(live._blocks.cache.kv), jax.tree.leaves(kv), strict=True
    ):
        np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=5e-5)


def check_scan(live):
    """The first three blocks are those of `rollout` for a clip of which the same is given."""
    *blocks, last = held_blocks(live)[:3]
    assert blocks[0].clean.video.shape[1] < last.clean.video.shape[1]
    join_all = functools.partial(jax.tree.map, lambda *x: jnp.concatenate(x, axis=1))
    found, mask = (join_all(*(getattr(b, n) for b in [*blocks, last])) for n in ("clean", "mask"))
    # what was not given is not shown to it
    given = jax.tree.map(
        lambda x, m: x * (jnp.repeat(m, x.shape[1] // m.shape[1], axis=1) == 0)[..., None],
        found, mask,
    )  # fmt: skip
    steering, model = live._steering, (live._blocks.model, live._blocks.params)
    expected = student.rollout(
        *model, steering.text, live._blocks.rope, steering.key, config=live.config, num_blocks=3,
        batch=1, condition=Condition(given, mask, last.frozen),
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_sound_given_is_sound_out(pipeline):
    """All at once, or piece by piece, or with another future: the same blocks, and the sound."""
    live = session(pipeline, given="audio")
    start = live.snapshot()
    waveform = sound(3.2)
    live.push_audio(waveform, RATE)
    chunks = [live.step() for _ in range(4)]
    border = live.num_samples
    tail = live.finish()
    frames, played = join([*chunks, tail])
    assert border == 3 * RATE and live.num_samples == 3 * RATE + 240  # a mel frame more
    np.testing.assert_array_equal(played, waveform[:, : played.shape[1]])
    assert not any(chunk.late or chunk.waiting for chunk in chunks)
    check_scan(live)

    live.restore(start)
    look_ahead = live._media.audio_encoder.look_ahead(RATE)
    changed = waveform + sound(3.2, seed=1)
    begin = 0
    for block, chunk in enumerate(chunks):
        end = block * RATE + look_ahead  # no more than the block needs
        live.push_audio(waveform[:, begin:end], RATE)
        begin = end
        if block == 2:
            state = live.snapshot()
            live.push_audio(changed[:, end:], RATE)
        again = live.step()
        np.testing.assert_array_equal(again.frames, chunk.frames)
        np.testing.assert_array_equal(again.waveform[:, :23000], chunk.waveform[:, :23000])
        assert again.late == 0
        if block == 2:
            live.restore(state)
            np.testing.assert_array_equal(live.step().frames, chunk.frames)
    assert np.std(frames[:, 1:].astype(float)) > 1


def test_sound_that_is_late(pipeline):
    live = session(pipeline, given="audio", wait=True)
    assert live.step().waiting
    live.push_audio(sound(1.5), RATE)
    assert [live.step().waiting for _ in range(3)] == [False, False, True]
    assert live.num_blocks == 2
    live._wait = False
    chunk = live.step()
    look_ahead = live._media.audio_encoder.look_ahead(RATE) / RATE
    assert chunk.late == pytest.approx(0.5 + look_ahead)
    assert not chunk.waveform[:, -RATE // 2 :].any() and chunk.waveform[:, : RATE // 2].any()


def test_a_push_while_a_block_is_made(pipeline, monkeypatch):
    """What another thread gives in the middle of a step is neither lost nor taken back."""
    live = session(pipeline, given="audio")
    waveform = sound(4.0)
    live.push_audio(waveform[:, :RATE], RATE)
    media, begun, encoded = type(live._media), threading.Event(), threading.Event()
    take = media.take

    def push():
        begun.set()
        live.push_audio(waveform[:, RATE : 2 * RATE], RATE)
        encoded.set()

    def interrupted(*arguments):
        taken = take(*arguments)
        pusher.start()
        begun.wait()
        encoded.wait(0.2)  # it ends in here if nothing holds it up
        return taken

    pusher = threading.Thread(target=push)
    monkeypatch.setattr(media, "take", interrupted)
    live.step()
    monkeypatch.undo()
    pusher.join()
    live.push_audio(waveform[:, 2 * RATE :], RATE)
    played = join([live.step(), live.step()])[1]
    np.testing.assert_array_equal(played, waveform[:, : 2 * RATE])


def test_replays_with_turns(pipeline):
    """From a snapshot in the middle, and from the log of its turns."""
    log = []
    live = session(pipeline, given="audio", log=log.append)
    waveform, start = sound(5.0), live.snapshot()
    live.push_audio(waveform[:, : RATE + 5000], RATE)
    live.set_image(picture())
    first = live.step()
    live.set_image(picture(1), strength=0.7)  # waits for the next block
    live.set_prompt(contexts(pipeline, seed=1))
    snapshot = pickle.loads(pickle.dumps(live.snapshot()))

    def go_on():
        chunks = [live.step()]
        live.set_prompt(contexts(pipeline, seed=2))
        live.push_audio(waveform[:, RATE + 5000 :], RATE)
        return join([*chunks, *(live.step() for _ in range(3))])

    expected, end = go_on(), live.snapshot()
    assert [(turn.kind, turn.block) for turn in log] == [
        ("audio", 0), ("image", 0), ("image", 1), ("prompt", 1), ("prompt", 2), ("audio", 2)
    ]  # fmt: skip
    live.restore(start)
    live.add(*list(log))
    np.testing.assert_array_equal(live.step().frames, first.frames)
    for a, b in zip(join([live.step() for _ in range(4)]), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="is for block 0, and 5 blocks are made"):
        live.add(log[0])
    live.restore(snapshot)
    for a, b in zip(go_on(), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, live.snapshot()["cache"], end["cache"])
    assert sorted(end["held"]) == [0, 1, 3, 4]


def test_a_picture_begins_the_stream(pipeline):
    """Block 0 of the prefix layout is the picture, as its VAE keeps it."""
    live = session(pipeline)
    plain = live.snapshot()
    live.set_image(picture())
    found = live.step().frames
    latent = MediaEncoder.from_pipeline(pipeline).encode_image(picture()).reshape(1, 1, 2, 2, -1)
    decoder = live._decoders.video
    _, expected = decoder.push(decoder.init(1, *PIXELS), latent)
    np.testing.assert_array_equal(found, expected)
    following = live.step().frames
    live.step()
    check_scan(live)
    live.restore(plain)
    assert not np.array_equal(live.step().frames, found)
    assert not np.array_equal(live.step().frames, following)


def test_goes_on_from_a_clip(pipeline):
    """The clip's own blocks come out as the VAEs keep them, and the decoders go on behind them."""
    live, clip = session(pipeline), film(30)
    live.extend(clip, sound(1.25), RATE)
    live._apply_turns()
    assert live._steering.given.video.shape[1] == 4 and live._steering.given.audio.shape[1] == 26
    first, second = live.step(), live.step()
    frames = np.concatenate([first.frames, second.frames], axis=1)
    latents = MediaEncoder.from_pipeline(pipeline).encode_frames(
        clip[:, :25] / np.float32(127.5) - 1
    )
    decoder = live._decoders.video
    latents = latents.reshape(1, 4, 2, 2, -1)
    state, start = decoder.push(decoder.init(1, *PIXELS), latents[:, :1])
    _, rest = decoder.push(state, latents[:, 1:])
    np.testing.assert_allclose(frames.astype(int), np.concatenate([start, rest], 1), atol=1)
    third = live.step()
    assert (third.block, third.first_frame, third.frames.shape[1]) == (2, 25, 24)
    chunks = [first, second, third, live.finish()]
    check_scan(live)
    # the clip and what was generated behind it, decoded in one go
    blocks = [condition.clean for condition in held_blocks(live)]
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *blocks)
    np.testing.assert_allclose(whole.video[:, :16], latents.reshape(1, 16, -1), atol=1e-5)
    tokens = whole.video.reshape(1, 7, 2, 2, -1)
    state, expected = decoder.push(decoder.init(1, *PIXELS), tokens)
    expected = np.concatenate([expected, decoder.flush(state)[1]], axis=1)
    frames, waveform = join(chunks)
    np.testing.assert_allclose(frames.astype(int), expected, atol=1)
    state, expected = live._decoders.audio.push(live._decoders.audio.init(1), whole.audio)
    expected = np.concatenate([expected, live._decoders.audio.flush(state)[1]], axis=1)
    np.testing.assert_allclose(waveform, expected, atol=1e-5)
    assert waveform.shape[1] == 2 * RATE + 240


def test_a_minute_of_given_sound(pipeline):
    """To the sample and in time with the blocks' latents, however it arrives; without a sampler."""
    media = session(pipeline, given="audio")._media
    waveform = sound(60.5)
    state, taken, played, begin = media.init(), [], [], 0
    for block in range(61):
        end = begin + (26500, 21500)[block % 2]
        state = media.push_audio(state, waveform[:, begin:end], RATE)
        begin = end
        state, late = media.fill(state, block)
        state, condition = media.take(state, block)
        assert not late
        taken.append(condition.clean.audio)
        state, samples = media.played(state, block, sum(map(len, played)), flushed=False)
        played.append(samples[0])
    np.testing.assert_array_equal(np.concatenate(played), waveform[0, : 60 * RATE])
    # a picture in block 0 and its sound are the whole block: that is compiled before it
    assert any(map(given.is_whole, media.programs(media.init(), first=True)))
    expected = media.audio_encoder.encode(waveform, RATE, 1501)
    np.testing.assert_array_equal(np.concatenate(taken, axis=1), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "version, layout, batch", [("2.0", "merged", 1), ("2.3", "prefix", 1), ("2.3", "merged", 2)]
)
def test_every_kind_of_session(random_checkpoint, version, layout, batch):
    """A picture, given sound and a new prompt with recache: the sound comes out, blocks replay, and
    the cache is that of a masked pass; so it is behind references."""
    pipeline = load_pipeline(random_checkpoint(version), dtype=jnp.float32, encoders=True)
    live = session(pipeline, given="audio", layout=layout, batch=batch)
    rate = pipeline.config.vocoder.sample_rate
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, (batch, 5 * rate, 2))
    live.push_audio(waveform, rate)
    live.set_image(picture())
    chunks = [live.step(), live.step()]
    live.set_prompt(contexts(pipeline, seed=1, batch=batch))
    live.set_image(picture(1), strength=0.5)
    snapshot = live.snapshot()
    chunks += [live.step(), live.step()]
    frames, played = join(chunks)
    np.testing.assert_array_equal(played, waveform[:, : played.shape[1]].astype(np.float32))
    assert frames.shape[0] == batch and not any(chunk.late for chunk in chunks)
    live.restore(snapshot)
    for a, b in zip(join([live.step(), live.step()]), join(chunks[2:]), strict=True):
        np.testing.assert_array_equal(a, b)
    check_keys(live, contexts(pipeline, seed=1, batch=batch))
    live = session(pipeline, layout=layout, batch=batch)
    live.set_reference(picture(), waveform[:, :rate], rate)
    while live.num_blocks < live.config.cache.capacity:
        live.step()
    check_keys(live, contexts(pipeline, batch=batch))


@pytest.mark.slow
def test_references_are_not_shown(pipeline):
    live = session(pipeline)
    live.set_reference(picture(), sound(1.0), RATE)
    chunks = [live.step()]
    assert (chunks[0].block, chunks[0].first_frame, chunks[0].frames.shape[1]) == (0, 0, 1)
    assert live.num_blocks == 2  # of the references
    chunks.append(live.step())
    assert (chunks[1].block, chunks[1].first_frame, chunks[1].frames.shape[1]) == (1, 1, 24)
    check_cache(live, contexts(pipeline), held=3)
    chunks += [live.step(), live.finish()]
    frames, waveform = join(chunks)
    assert (frames.shape[1], waveform.shape[1]) == (49, 2 * RATE + 240)  # as of any stream
    voiced = session(pipeline, given="audio")
    voiced.set_reference(picture(), sound(1.0), RATE)
    waveform = sound(2.2, seed=1)
    voiced.push_audio(waveform, RATE)
    chunks = [voiced.step() for _ in range(3)]
    frames, played = join(chunks)
    assert frames.shape[1] == 49  # the frame at second 1 is the 25th, as of any stream
    np.testing.assert_array_equal(played, waveform[:, : 2 * RATE])
    played = join([*chunks, voiced.finish()])[1]
    np.testing.assert_array_equal(played, waveform[:, : 2 * RATE + 240])


def test_references_need_blocks_to_be_shown(pipeline):
    """They are refused where `max_blocks` ends within them, and after anything else."""
    live = session(pipeline, anchors=3, max_blocks=3)
    with pytest.raises(ValueError, match="3 blocks before the first that is shown"):
        live.set_reference(picture(), sound(1.0), RATE)
    assert not live._steering.given.hidden and live._steering.given.skip == (0, 0)
    live.set_image(picture())
    with pytest.raises(RuntimeError, match="before all else"):
        live.set_reference(picture(), sound(1.0), RATE)
    assert unshown_blocks(pipeline.config.layout("merged"), 2) == 2


def test_frames_are_encoded_a_few_at_a_time(pipeline, monkeypatch):
    latents = []
    for count in (given._FRAMES_AT_A_TIME, 7):
        monkeypatch.setattr(given, "_FRAMES_AT_A_TIME", count)
        live = session(pipeline, given="video")
        live.push_frames(film(40))
        live._apply_turns()
        latents.append(live._steering.given.video)
    assert latents[0].shape[1] == 4
    np.testing.assert_array_equal(*latents)


def test_a_picture_given_is_shown_as_it_was(pipeline):
    live, clip = session(pipeline, given="video"), film(50)
    live.push_frames(clip[:, :20])
    live.push_frames(clip[:, 20:40])
    chunks = [live.step() for _ in range(3)]
    assert [chunk.late for chunk in chunks] == [0, 0, 9 / 24]
    frames, waveform = join(chunks)
    np.testing.assert_array_equal(frames[:, :40], clip[:, :40])
    np.testing.assert_array_equal(frames[:, 40:], clip[:, 39:40].repeat(9, axis=1))
    assert waveform.shape[1] == live.num_samples > RATE
    check_scan(live)


def test_recache_is_the_masked_pass(pipeline):
    """After a change of prompt the next block sees what one uncached pass under it would show."""
    live = session(pipeline)
    for _ in range(6):
        live.step()
    before = live.snapshot()["cache"]
    live.set_prompt(contexts(pipeline, seed=1))
    live._apply_turns()
    live._blocks.recache(live._steering, live.num_blocks)
    check_cache(live, contexts(pipeline, seed=1), held=4)
    found, other = (next_block(live, cache).video for cache in (live._blocks.cache, before))
    assert np.abs(found - other).max() > 1e-3


def test_bad_input_is_refused(pipeline, random_pipeline):
    live = session(pipeline)
    for give, message in (
        (lambda: live.push_audio(sound(1), RATE), "given='audio'"),
        (lambda: live.push_frames(film(1)), "given='video'"),
        (lambda: live.set_image(picture()[:32]), "takes pictures"),
        (lambda: live.set_image(picture(), 2.0), "strength"),
        (lambda: live.extend(film(9).astype(np.float32), sound(1), RATE), "uint8 frames"),
        (lambda: session(random_pipeline("2.0"), given="audio"), "encoders=True"),
        (lambda: session(pipeline, given="sound"), "given must be"),
    ):
        with pytest.raises(ValueError, match=message):
            give()
    live.step()
    with pytest.raises(RuntimeError, match="before its first block"):
        live.extend(film(9), sound(1), RATE)
