"""Streaming decode: equal to the whole-clip decode where it must be, exact counts, small state."""

import dataclasses
import functools
import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.models.tiny_decoder import TinyDecoderConfig
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.models.video_vae.model import VAEStage, VideoVAEConfig
from omniforcing_jax.streaming import video as streaming_video
from omniforcing_jax.streaming.video import StreamingVideoDecoder, seam_error, to_uint8

decode = jax.jit(video_vae.decode, static_argnames=("config", "causal", "dtype"))

RES = VAEStage("res_x", num_layers=1)
UP = VAEStage("compress_all", multiplier=2, residual=True)

# Compression 2 in time and 4 in space, receptive field 7 pixel frames: 4 latents on either side.
SMALL = VideoVAEConfig(
    encoder_blocks=(RES, VAEStage("compress_all", multiplier=2)),
    decoder_blocks=(RES, UP),
    latent_channels=4,
    patch_size=2,
    decoder_base_channels=8,
)
# All stage kinds, compression 8 in time and 16 in space as LTX-2.3 upsamples.
DEEP = VideoVAEConfig(
    encoder_blocks=(
        RES,
        VAEStage("compress_space", multiplier=2),
        VAEStage("compress_time", multiplier=2),
        VAEStage("compress_all", multiplier=2),
        VAEStage("compress_all", multiplier=2),
    ),
    decoder_blocks=(
        RES,
        VAEStage("compress_space", multiplier=2),
        RES,
        VAEStage("compress_time", multiplier=2),
        VAEStage("compress_all", multiplier=1),
        RES,
        VAEStage("compress_all", multiplier=2),
    ),
    latent_channels=4,
    patch_size=2,
    decoder_base_channels=4,
    encoder_padding_mode="zeros",
    decoder_padding_mode="zeros",
)
CONFIGS = {"small": SMALL, "deep": DEEP}


@functools.cache
def random_params(config):
    """Random parameters, biases and latent statistics included."""
    params = video_vae.init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)

    def fill(leaf):
        return leaf if leaf.ndim > 1 else 0.1 * rng.standard_normal(leaf.shape, np.float32)

    channels = config.latent_channels
    statistics = {
        "mean": rng.standard_normal(channels, np.float32),
        "std": rng.uniform(0.5, 2.0, channels).astype(np.float32),
    }
    return jax.tree.map(fill, params) | {"per_channel_statistics": statistics}


def random_model(config, num_latents, batch=1, size=(2, 3)):
    """(params, latents [B, num_latents, h, w, C]) with outputs that use much of [-1, 1]."""
    shape = (batch, num_latents, *size, config.latent_channels)
    latents = np.random.default_rng(1).standard_normal(shape, np.float32)
    return random_params(config), jnp.asarray(latents)


def start(decoder, latents):
    """`decoder.init` for these latents."""
    step = decoder.config.spatial_compression
    return decoder.init(latents.shape[0], latents.shape[2] * step, latents.shape[3] * step)


def stream(decoder, latents, chunks):
    """(all frames [B, F, H, W, 3] uint8, frames emitted by each push and the flush)."""
    state, parts, begin = start(decoder, latents), [], 0
    for length in chunks:
        state, frames = decoder.push(state, latents[:, begin : begin + length])
        begin += length
        parts.append(np.asarray(frames))
        assert sum(p.shape[1] for p in parts) == decoder.frames_after(begin)
    assert begin == latents.shape[1]
    parts.append(np.asarray(decoder.flush(state)[1]))
    assert sum(p.shape[1] for p in parts) == decoder.frames_after(begin, flushed=True)
    return np.concatenate(parts, axis=1), [p.shape[1] for p in parts]


def assert_same_pixels(found, expected, different=0.001):
    """Equal up to rounding: a value may change by one level where float error crosses a half."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.uint8
    error = np.abs(found.astype(int) - np.asarray(expected).astype(int))
    assert error.max() <= 1 and error.mean() <= different


# Mode "causal".


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_chunks_equal_the_causal_clip(name):
    config = CONFIGS[name]
    params, latents = random_model(config, 10, batch=2 if name == "small" else 1)
    whole = decode(config, params, latents, causal=True)
    chunk = jax.jit(video_vae.decode_chunk, static_argnames="config")
    for chunks in ([1] * 10, [4, 3, 3], [1, 3, 3, 3]):
        cache, begin, parts = None, 0, []
        for length in chunks:
            video, cache = chunk(config, params, latents[:, begin : begin + length], cache)
            begin += length
            parts.append(video)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5, err_msg=chunks)


@pytest.mark.parametrize("chunks", [[1] * 7, [4, 3], [1, 3, 3], [7]])
def test_causal_stream_equals_the_causal_clip(chunks):
    params, latents = random_model(SMALL, 7)
    decoder = StreamingVideoDecoder(SMALL, params, mode="causal")
    frames, counts = stream(decoder, latents, chunks)
    assert_same_pixels(frames, to_uint8(decode(SMALL, params, latents, causal=True)))
    assert counts == [2 * chunks[0] - 1, *(2 * n for n in chunks[1:]), 0]


def test_causal_state_is_two_frames_per_convolution():
    params, latents = random_model(DEEP, 4)
    decoder = StreamingVideoDecoder(DEEP, params, mode="causal")
    state = start(decoder, latents)
    convolutions = jax.tree.leaves(params["decoder"], is_leaf=lambda node: "kernel" in node)
    assert len(jax.tree.leaves(state.cache)) == len(convolutions)
    before = jax.tree.map(jnp.shape, state.cache)
    for begin in (0, 1):
        state, _ = decoder.push(state, latents[:, begin : begin + 1])
        assert jax.tree.map(jnp.shape, state.cache) == before
    statistics = jax.tree.map(np.asarray, params["per_channel_statistics"])
    raw = np.asarray(latents) * statistics["std"] + statistics["mean"]
    np.testing.assert_allclose(state.cache["conv_in"], raw[:, :2], atol=1e-6)


# Mode "window".


@pytest.mark.parametrize("chunks", [[4, 3, 3, 3, 3], [1, 3, 3, 3, 3, 3]])
@pytest.mark.parametrize(("look_back", "blend"), [(0, 0), (2, 2)])
def test_window_equals_the_clip_when_it_covers_the_receptive_field(chunks, look_back, blend):
    params, latents = random_model(SMALL, 16)
    options = {"look_back": look_back, "look_ahead": 4, "blend": blend}
    decoder = StreamingVideoDecoder(SMALL, params, **options)
    frames, _ = stream(decoder, latents, chunks)
    assert_same_pixels(frames, to_uint8(decode(SMALL, params, latents, causal=False)))


def test_window_is_nearer_to_the_clip_than_one_that_forgets():
    """What came before is kept, not decoded again: five latents are decoded instead of nine.

    The other one decodes windows as clips of their own, with four latents before the first new
    frame and one behind the last, and fades over another one, so its frames lag as much.
    """
    params, latents = random_model(DEEP, 16)
    whole = np.asarray(decode(DEEP, params, latents, causal=False))
    frames, _ = stream(StreamingVideoDecoder(DEEP, params), latents, [1, 3, 3, 3, 3, 3])
    forgetful = np.zeros_like(whole)
    for end in (4, 7, 10, 13, 16):
        start = max(0, end - 9)
        window = np.asarray(decode(DEEP, params, latents[:, start:end], causal=False))
        first, origin = max(0, 8 * (end - 5) - 7), 8 * start  # frames
        new = window[:, first - origin :]
        fade = np.ones((new.shape[1], 1, 1, 1))
        if end > 4:
            fade[:8, 0, 0, 0] = np.arange(1, 9) / 9
        forgetful[:, first : first + new.shape[1]] *= 1 - fade
        forgetful[:, first : first + new.shape[1]] += fade * new
    error, once = (
        np.square(np.asarray(to_uint8(x), int) - np.asarray(to_uint8(whole), int)).mean()
        for x in (frames / 127.5 - 1, forgetful)
    )
    assert 0 < error < 0.8 * once


@pytest.mark.parametrize("name", CONFIGS)
def test_no_look_ahead_emits_up_to_the_newest_frame(name):
    config = CONFIGS[name]
    params, latents = random_model(config, 10)
    decoder = StreamingVideoDecoder(config, params, look_back=2, look_ahead=0, blend=0)
    frames, counts = stream(decoder, latents, [4, 3, 3])
    step = config.temporal_compression
    assert counts == [3 * step + 1, 3 * step, 3 * step, 0]
    first = to_uint8(decode(config, params, latents[:, :4], causal=False))
    assert_same_pixels(frames[:, : counts[0]], first)


def test_blend_fades_from_one_window_to_the_next():
    params, latents = random_model(SMALL, 10)
    options = {"look_back": 1, "look_ahead": 1}
    decoder = StreamingVideoDecoder(SMALL, params, blend=2, **options)
    frames, counts = stream(decoder, latents, [4, 6])
    # Windows of [0, 4) and [0, 10): 3 latents are held back, so the first push settles latent 0.
    assert counts == [1, 12, 6]
    old = np.asarray(decode(SMALL, params, latents[:, :4], causal=False), np.float32)
    new = np.asarray(decode(SMALL, params, latents, causal=False), np.float32)
    weight = np.arange(1, 5).reshape(4, 1, 1, 1) / 5
    expected = np.concatenate(
        [old[:, :1], (1 - weight) * old[:, 1:5] + weight * new[:, 1:5], new[:, 5:]], axis=1
    )
    assert np.abs(old[:, 1:5] - new[:, 1:5]).max() > 0.05
    assert_same_pixels(frames, np.asarray(to_uint8(expected)))


def test_fade_longer_than_a_chunk_goes_on_in_the_next():
    params, latents = random_model(SMALL, 9)
    whole = np.asarray(to_uint8(decode(SMALL, params, latents, causal=False))).astype(int)
    errors = []
    for blend in (0, 1, 3):
        decoder = StreamingVideoDecoder(SMALL, params, look_back=3, look_ahead=0, blend=blend)
        errors.append(np.abs(stream(decoder, latents, [1] * 9)[0] - whole).mean())
    # Each step of a fade brings in a window that has seen more.
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2]


@pytest.mark.parametrize("num_latents", [0, 1, 3])
def test_flush_of_a_clip_shorter_than_the_delay(num_latents):
    params, latents = random_model(SMALL, 3)
    decoder = StreamingVideoDecoder(SMALL, params, look_ahead=2, blend=1)
    state = start(decoder, latents)
    for i in range(num_latents):
        state, frames = decoder.push(state, latents[:, i : i + 1])
        assert frames.shape == (1, 0, 8, 12, 3) and frames.dtype == jnp.uint8
    state, frames = decoder.flush(state)
    if num_latents:
        whole = decode(SMALL, params, latents[:, :num_latents], causal=False)
        assert_same_pixels(np.asarray(frames), np.asarray(to_uint8(whole)))
    else:
        assert frames.shape == (1, 0, 8, 12, 3)
    assert int(state.num_latents) == 0


# Both modes; "tiny" has its tests beside its network's.


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_state_can_be_saved_and_restored(mode):
    params, latents = random_model(SMALL, 10)
    decoder = StreamingVideoDecoder(SMALL, params, mode=mode)
    expected, counts = stream(decoder, latents, [4, 3, 3])
    state, first = decoder.push(start(decoder, latents), latents[:, :4])
    saved = flax.serialization.to_bytes(jax.device_get(state))
    del state
    other = StreamingVideoDecoder(SMALL, params, mode=mode)
    state = flax.serialization.from_bytes(start(other, latents), saved)
    parts = [first]
    for begin in (4, 7):
        state, frames = other.push(state, latents[:, begin : begin + 3])
        parts.append(frames)
    parts.append(other.flush(state)[1])
    assert [p.shape[1] for p in parts] == counts
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_flush_starts_a_new_clip(mode):
    params, latents = random_model(SMALL, 7)
    decoder = StreamingVideoDecoder(SMALL, params, mode=mode)
    state, parts = start(decoder, latents), []
    for _ in range(2):
        frames = []
        for begin, end in ((0, 4), (4, 7)):
            state, new = decoder.push(state, latents[:, begin:end])
            frames.append(new)
        state, new = decoder.flush(state)
        parts.append(np.concatenate([*frames, new], axis=1))
    assert parts[0].shape[1] == decoder.frames_after(7, flushed=True)
    np.testing.assert_array_equal(parts[0], parts[1])


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_steady_state_does_not_compile(mode, monkeypatch):
    # A width of its own keeps other tests' compiled functions out of the count.
    config = dataclasses.replace(SMALL, decoder_base_channels=16)
    params, latents = random_model(config, 4 + 6 * 3)
    traces = itertools.count()
    trace = streaming_video.decode_chunk
    monkeypatch.setattr(
        streaming_video, "decode_chunk", lambda *args, **kw: (next(traces), trace(*args, **kw))[1]
    )
    decoder = StreamingVideoDecoder(config, params, mode=mode, look_back=4)
    state = start(decoder, latents)
    state, _ = decoder.push(state, latents[:, :4])
    shapes, counts = [], []
    for begin in range(4, latents.shape[1], 3):
        state, _ = decoder.push(state, latents[:, begin : begin + 3])
        shapes.append(jax.tree.map(jnp.shape, state))
        counts.append(next(traces))
    # One trace per push at most, and none (the count grows by our own peek alone) once steady.
    assert counts[0] >= 2
    assert np.diff(counts[2:]).tolist() == [1] * (len(counts) - 3)
    assert all(shape == shapes[2] for shape in shapes[3:])


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_bfloat16_stays_close(mode):
    params, latents = random_model(SMALL, 10)
    options = {"mode": mode, "look_back": 4, "look_ahead": 4}
    decoder = StreamingVideoDecoder(SMALL, params, dtype=jnp.bfloat16, **options)
    frames, _ = stream(decoder, latents, [4, 3, 3])
    whole = np.asarray(to_uint8(decode(SMALL, params, latents, causal=mode == "causal")))
    assert np.abs(frames.astype(int) - whole.astype(int)).mean() < 2.0


def test_frames_after():
    params, _ = random_model(DEEP, 1)
    window = StreamingVideoDecoder(DEEP, params, look_ahead=2, blend=1)
    causal = StreamingVideoDecoder(DEEP, params, mode="causal")
    assert [window.frames_after(n) for n in (0, 1, 3, 4, 5)] == [0, 0, 0, 1, 9]
    assert [window.frames_after(n, flushed=True) for n in (0, 1, 3, 4)] == [0, 1, 17, 25]
    for n in (0, 1, 4, 7):
        assert causal.frames_after(n) == causal.frames_after(n, True) == max(0, 8 * n - 7)


def test_to_uint8_rounds_and_clips():
    values = jnp.array([-2.0, -1.0, -0.999, 0.001, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiled"}, "mode must be one of"),
        ({"mode": "tiny"}, "no tiny decoder; python -m checkpoint_converters.tiny_decoder"),
        ({"mode": "tiny", "tiny": TinyDecoderConfig()}, "are for different models"),
        ({"look_back": -1}, "look_back must be an integer >= 0"),
        ({"look_ahead": -1}, "look_ahead must be an integer >= 0"),
        ({"blend": -1}, "blend must be an integer >= 0"),
        ({"blend": 0.5}, "blend must be an integer >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        StreamingVideoDecoder(SMALL, {"decoder": {}}, **options)


def test_window_refuses_a_causal_decoder():
    config = dataclasses.replace(SMALL, causal_decoder=True)
    with pytest.raises(ValueError, match="mode='causal'"):
        StreamingVideoDecoder(config, {"decoder": {}})


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_bad_shapes(mode):
    params, latents = random_model(SMALL, 3)
    decoder = StreamingVideoDecoder(SMALL, params, mode=mode)
    with pytest.raises(ValueError, match="multiples of 4"):
        decoder.init(1, 8, 10)
    with pytest.raises(ValueError, match="2x2 latents, got 1x3"):
        decoder.init(1, 4, 12)
    with pytest.raises(ValueError, match="batch"):
        decoder.init(0, 8, 12)
    state = start(decoder, latents)
    with pytest.raises(ValueError, match="w, 4"):
        decoder.push(state, latents[..., :3])
    with pytest.raises(ValueError, match=r"shape \(1, 3, 2, 3, 4\)"):
        decoder.push(state, jnp.concatenate([latents, latents]))
    with pytest.raises(ValueError, match="f >= 1"):
        decoder.push(state, latents[:, :0])


# Seams.


def test_seam_error():
    full = np.zeros((9, 2, 2, 3), np.uint8)
    streamed = full.copy()
    assert seam_error(full, streamed, [4]) == {"seam": 0.0, "median": 0.0, "ratio": 1.0}
    streamed[4] = 9
    # Eight of nine frames are exact: the mean error, 1, stands in for the median.
    assert seam_error(full, streamed, [4]) == {"seam": 4.5, "median": 0.0, "ratio": 4.5}
    streamed = streamed + 2
    assert seam_error(full, streamed, [4]) == {"seam": 6.5, "median": 2.0, "ratio": 3.25}
    assert seam_error(full, streamed, [2, 6])["ratio"] == 1.0
    for borders in ([], [0], [9]):
        with pytest.raises(ValueError, match="border"):
            seam_error(full, streamed, borders)
    with pytest.raises(ValueError, match="share a shape"):
        seam_error(full, streamed[:5], [2])
