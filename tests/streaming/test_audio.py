"""Streaming audio decoder: equal to the whole clip, to the sample, for any chunking."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters.reading import load_component
from omniforcing_jax.models.audio import vocoder
from omniforcing_jax.models.audio.vae import AudioVAEConfig, decode_audio
from omniforcing_jax.models.audio.vocoder import VocoderConfig, vocode
from omniforcing_jax.streaming import audio as streaming_audio
from omniforcing_jax.streaming.audio import StreamingAudioDecoder
from tests.models.audio.test_vocoder import random_params, small_bwe

# Equal shapes all over the file keep the number of compilations small
PREFIX = (1, 25, 25)
MERGED = (26, 25)
LENGTH = 51
BATCH = 2


def load(golden_dir, version):
    expected = np.load(golden_dir / f"{version}_tiny_expected.npz")
    metadata = json.loads(str(expected["config_json"]))
    path = golden_dir / f"{version}_tiny.safetensors"
    names = ("audio_vae", "vocoder")
    params = {name: load_component(path, name, np.float32) for name in names}
    vae_config = AudioVAEConfig.from_metadata(metadata["audio_vae"])
    return vae_config, VocoderConfig.from_metadata(metadata["vocoder"]), params, expected


@pytest.fixture(scope="module")
def hifigan(golden_dir):
    """Decoder with the weights of the LTX-2.0 reference."""
    return StreamingAudioDecoder(*load(golden_dir, "ltx2")[:3])


@pytest.fixture(scope="module")
def extended(golden_dir):
    """LTX-2.3 VAE with a small random vocoder of LTX-2.3's two stages and rates."""

    vae_config, _, params, _ = load(golden_dir, "ltx23")
    config = small_bwe()
    params["vocoder"] = random_params(config)
    return StreamingAudioDecoder(vae_config, config, params)


@pytest.fixture(params=["hifigan", "extended"])
def decoder(request):
    return request.getfixturevalue(request.param)


def random_latents(decoder, length, batch=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    width = decoder.vae_config.latent_width
    return rng.standard_normal((batch, length, width)).astype(np.float32)


def stream(decoder, latents, chunks):
    """The waveform of a stream in chunks; checks the sample count after every call."""
    state = decoder.init(latents.shape[0])
    pieces, position, samples = [], 0, 0
    for length in chunks:
        state, waveform = decoder.push(state, latents[:, position : position + length])
        position += length
        pieces.append(waveform)
        samples += waveform.shape[1]
        assert samples == decoder.samples_after(position, flushed=False)
    state, waveform = decoder.flush(state)
    pieces.append(waveform)
    assert samples + waveform.shape[1] == decoder.samples_after(position, flushed=True)
    return np.concatenate(pieces, axis=1)


def whole_clip(decoder, latents):
    log_mel = decode_audio(decoder.params["audio_vae"], decoder.vae_config, latents)
    return vocode(decoder.params["vocoder"], decoder.vocoder_config, log_mel)


# The last is shorter than the look-ahead, so that the flush synthesises all of it
@pytest.mark.parametrize(
    "chunks",
    [PREFIX, (2, 1), *(pytest.param(c, marks=pytest.mark.slow) for c in (MERGED, (25, 1, 25)))],
)
def test_stream_equals_whole_clip(decoder, chunks):
    latents = random_latents(decoder, sum(chunks))
    streamed = stream(decoder, latents, chunks)
    whole = whole_clip(decoder, latents)
    assert streamed.shape == whole.shape
    assert np.std(whole) > 1e-3
    np.testing.assert_allclose(streamed, whole, atol=1e-5, rtol=0)


def test_stream_matches_reference_2_0(golden_dir):
    vae_config, config, params, expected = load(golden_dir, "ltx2")
    decoder = StreamingAudioDecoder(vae_config, config, params)
    tokens = np.transpose(expected["h_dec_latent"], (0, 2, 1, 3)).reshape(1, 7, -1)
    wanted = np.transpose(expected["j_waveform_from_h_dec_mel"], (0, 2, 1))
    np.testing.assert_allclose(stream(decoder, tokens, (7,)), wanted, atol=5e-5, rtol=0)


@pytest.mark.slow
def test_stream_matches_reference_2_3(golden_dir):
    """By default a small vocoder is streamed, and this one compared in tests/models."""
    vae_config, config, params, expected = load(golden_dir, "ltx23")
    decoder = StreamingAudioDecoder(vae_config, config, params)
    tokens = np.transpose(expected["h_dec_latent"], (0, 2, 1, 3)).reshape(1, 6, -1)
    wanted = np.transpose(expected["j_waveform_from_h_dec_mel"], (0, 2, 1))
    np.testing.assert_allclose(stream(decoder, tokens, (6,)), wanted, atol=3e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [PREFIX, MERGED])
def test_chunks_of_the_whole_2_3_vocoder(golden_dir, chunks):
    """All layers of LTX-2.3's two vocoder stages, whose compilation takes most of a minute."""
    vae_config, config, params, _ = load(golden_dir, "ltx23")
    decoder = StreamingAudioDecoder(vae_config, config, params)
    latents = random_latents(decoder, sum(chunks), batch=1)
    mel = decode_audio(params["audio_vae"], vae_config, latents)
    whole = vocode(params["vocoder"], config, mel)
    np.testing.assert_allclose(stream(decoder, latents, chunks), whole, atol=3e-4, rtol=0)


def test_sample_counts_of_both_layouts(golden_dir):
    """4 T - 3 mel frames, minus the vocoder's look-ahead before the flush."""
    vae_config, config, params, _ = load(golden_dir, "ltx2")
    decoder = StreamingAudioDecoder(vae_config, config, params)
    assert config.right_context == 18
    prefix = [decoder.samples_after(n, False) for n in np.cumsum(PREFIX)]
    assert prefix == [0, (101 - 18) * 240, (201 - 18) * 240]
    merged = [decoder.samples_after(n, False) for n in np.cumsum(MERGED)]
    assert merged == prefix[1:]
    # 121 frames at 24 fps: 126 latents, 501 mel frames
    assert decoder.samples_after(126, True) == 120240
    assert decoder.samples_after(0, False) == decoder.samples_after(0, True) == 0
    assert decoder.sample_rate == 24000
    with pytest.raises(ValueError, match="0 or more"):
        decoder.samples_after(-1, True)


@pytest.mark.parametrize("pushes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_restored_state_continues_identically(decoder, pushes):
    latents = random_latents(decoder, LENGTH)
    state = decoder.init(BATCH)
    chunks = np.split(latents, np.cumsum(PREFIX)[:-1], axis=1)
    for chunk in chunks[:pushes]:
        state, _ = decoder.push(state, chunk)
    saved = jax.device_get(state)
    restored = jax.device_put(jax.tree.map(np.array, saved))
    outputs = []
    for branch in (state, restored):
        state, pieces = branch, []
        for chunk in chunks[pushes:]:
            state, waveform = decoder.push(state, chunk)
            pieces.append(waveform)
        state, waveform = decoder.flush(state)
        outputs.append(np.concatenate([*pieces, waveform], axis=1))
    np.testing.assert_array_equal(*outputs)


def test_state_is_a_value(decoder):
    """Pushing does not change the state, so a stream can be branched."""
    latents = random_latents(decoder, 26)
    state, _ = decoder.push(decoder.init(BATCH), latents[:, :1])
    _, first = decoder.push(state, latents[:, 1:])
    _, second = decoder.push(state, latents[:, 1:])
    np.testing.assert_array_equal(first, second)


def test_state_does_not_grow(decoder):
    latents = random_latents(decoder, 26)
    state = decoder.init(BATCH)
    shapes = jax.tree.map(jnp.shape, state)
    for chunk in (latents[:, :1], latents[:, 1:]):
        state, _ = decoder.push(state, chunk)
        assert jax.tree.map(jnp.shape, state) == shapes


def test_equal_pushes_share_one_program(decoder, monkeypatch):
    """One vocoder for the whole stream, flush included; two VAE decoders for a first push of 25."""
    traces = {"vae": 0, "vocoder": 0}
    decode_chunk, make_module = streaming_audio.decode_audio_chunk, vocoder.vocoder_module

    def counted_decode(*args, **kwargs):
        traces["vae"] += 1
        return decode_chunk(*args, **kwargs)

    def counted_module(*args):
        traces["vocoder"] += 1
        return make_module(*args)

    monkeypatch.setattr(streaming_audio, "decode_audio_chunk", counted_decode)
    monkeypatch.setattr(vocoder, "vocoder_module", counted_module)
    latents = random_latents(decoder, 25, batch=3)  # a batch no other test uses
    state = decoder.init(3)
    for _ in range(5):
        state, _ = decoder.push(state, latents)
    decoder.flush(state)
    assert traces == {"vae": 2, "vocoder": 1}


def test_bfloat16(hifigan, extended):
    """The VAE's, and the vocoder's unless it has snakes."""
    decoder = StreamingAudioDecoder(
        hifigan.vae_config, hifigan.vocoder_config, hifigan.params, dtype=jnp.bfloat16
    )
    latents = random_latents(decoder, LENGTH)
    state = decoder.init(BATCH)
    assert state.history["conv_in"].dtype == jnp.bfloat16
    kernels = [decoder.params["vocoder"][name]["kernel"].dtype for name in ("ups_0", "conv_post")]
    assert kernels == [jnp.bfloat16, jnp.float32]
    with_snakes = StreamingAudioDecoder(
        extended.vae_config, extended.vocoder_config, extended.params, dtype=jnp.bfloat16
    )
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(with_snakes.params["vocoder"])}
    assert dtypes == {jnp.dtype(jnp.float32)}
    rounded = stream(decoder, latents, PREFIX)
    exact = whole_clip(decoder, latents)
    assert rounded.dtype == np.float32
    assert np.isfinite(rounded).all()
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(np.square(exact)))
    assert 0 < error < 0.1


def test_misuse_is_named(hifigan):
    latents = random_latents(hifigan, 2)
    state = hifigan.init(BATCH)
    with pytest.raises(ValueError, match="batch 2, latents have 1"):
        hifigan.push(state, latents[:1])
    with pytest.raises(ValueError, match=r"\[B, T, 32\]"):
        hifigan.push(state, latents[..., :31])
    with pytest.raises(ValueError, match="T is 0"):
        hifigan.push(state, latents[:, :0])
    with pytest.raises(ValueError, match="batch must be 1"):
        hifigan.init(0)
    ended, waveform = hifigan.flush(state)
    assert waveform.shape == (BATCH, 0, 2)
    with pytest.raises(ValueError, match=r"begin a new one"):
        hifigan.push(ended, latents)
    with pytest.raises(ValueError, match="already"):
        hifigan.flush(ended)
    with pytest.raises(ValueError, match="params lack vocoder"):
        StreamingAudioDecoder(hifigan.vae_config, hifigan.vocoder_config, {"audio_vae": {}})
