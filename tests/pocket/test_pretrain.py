"""Pre-training: losses, batches, statistics, latents; the program is in test_pretrain_program."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import synthetic, synthetic_gemma
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models.audio.mel import MelConfig
from omniforcing_jax.models.audio.vae import AudioVAEConfig
from omniforcing_jax.models.audio.vocoder import HiFiGANConfig, VocoderConfig
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.text.gemma import TextTower, init_boxed_params
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.video_vae.model import VAEStage, VideoVAEConfig
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.text.tokenizer import load_tokenizer
from omniforcing_jax.training.metrics import may_be_missing
from omniforcing_jax.training.mixture import ConditionMixture, GivenInput
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import create_network, create_state
from pocket import pretrain_config
from pocket.pretraining import autoencoders, latents
from pocket.pretraining.autoencoders import ErrorLoss, LatentNoise
from pocket.pretraining.batches import DrawnBatches, WorldWindows
from pocket.pretraining.step import Pretraining
from pocket.pretraining.teacher import HeldOut, TeacherLoss, init_teacher
from pocket.world.captions import VOCABULARY
from pocket.world.dataset import clip_caption, make_clip
from pocket.world.physics import WorldConfig

WORLD = WorldConfig(width=32, height=16)
VIDEO = VideoVAEConfig(
    encoder_blocks=(VAEStage("compress_time", multiplier=2),),
    decoder_blocks=(VAEStage("compress_time"),),
    latent_channels=8,
    decoder_base_channels=16,
    decoder_padding_mode="zeros",
)
AUDIO = AudioVAEConfig(8, (1, 1, 1), 1, 2, MelConfig(n_fft=256))
VOCODER = VocoderConfig(
    HiFiGANConfig(
        initial_channels=8,
        upsample_rates=(160,),
        upsample_kernel_sizes=(320,),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
    ),
    sample_rate=16000,
)
PIPELINE = PipelineConfig.from_metadata(synthetic.metadata("pocket", "2.0"), "2.0.0")


def test_the_pocket_model_has_the_rates_of_the_large_one():
    """3 and 25 latents a second, and more than four times as many video tokens as audio tokens."""
    assert PIPELINE.video_vae.temporal_compression == 8
    mel = PIPELINE.audio_vae.mel
    assert mel.sample_rate / mel.hop / PIPELINE.audio_vae.downsampling == 25
    assert PIPELINE.vocoder.hop == mel.hop and PIPELINE.vocoder.sample_rate == mel.sample_rate
    height, width = PIPELINE.check_size(48, 64)
    assert 3 * height * width > 4 * 25
    with pytest.raises(ValueError, match="of version 2"):
        synthetic.metadata("pocket", "2.3")


def test_the_pocket_tokenizer_knows_every_word_of_every_caption(tmp_path):
    synthetic_gemma.write(tmp_path / "gemma", "pocket", words=VOCABULARY)
    tokenizer = load_tokenizer(tmp_path / "gemma")
    captions = [clip_caption(seed, WorldConfig()) for seed in range(300)]
    encoded = tokenizer.encode([*captions, "A RED ball!", "a violin"])
    unknown = synthetic_gemma.SPECIAL_TOKENS.index("<unk>")
    assert not any(unknown in ids for ids in encoded[:-1]) and unknown in encoded[-1]
    assert encoded[-2] == tokenizer.encode(["a red ball"])[0]
    assert tokenizer.vocab_size == len(VOCABULARY) + 4
    assert max(map(len, encoded)) <= pretrain_config.get_config("teacher").text_length


def test_batches_are_functions_of_their_number():
    draw = WorldWindows(WORLD).video(9)
    batches = DrawnBatches(draw, 2, seed=3)
    first = [next(batches) for _ in range(3)]
    again = DrawnBatches(draw, 2, seed=3)
    again.set_state({"batches": 2})
    np.testing.assert_array_equal(next(again)["frames"], first[2]["frames"])
    assert again.get_state() == batches.get_state() == {"batches": 3}
    assert first[0]["frames"].shape == (2, 9, 16, 32, 3)
    assert np.ptp(np.stack([b["frames"] for b in first]), axis=0).max() > 50


def test_windows_are_stretches_of_whole_clips():
    """Of picture, and of sound from a frame of the spectrogram on."""

    class Fixed:  # a generator that says what a test wants to hear
        def __init__(self, *values):
            self.values = list(values)

        def integers(self, *_):
            return self.values.pop(0)

    clip = make_clip(5, 121, WORLD)
    windows = WorldWindows(WORLD)
    video = windows.video(9)(Fixed(40, 5))["frames"]
    np.testing.assert_array_equal(video, clip.frames[40:49])
    sound = windows.sound(1600, 160)(Fixed(7, 5))["waveform"]
    np.testing.assert_array_equal(sound, clip.waveform[1120:2720])
    with pytest.raises(ValueError, match="from 1 to 121"):
        windows.video(122)


@functools.cache
def video_part():
    """A loss that can be trained in a few steps."""
    loss = autoencoders.VideoLoss(VIDEO, LatentNoise(0.05, 1e-3), ErrorLoss(0.3, 10.0))
    return loss, autoencoders.init_video_vae(VIDEO, jax.random.key(0))


def trained(loss, params, frozen, draw, steps=12, learning_rate=3e-3):
    """(losses of the steps, parameters): a few steps on the same batch."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate, weight_decay=0.01))
    stage = Pretraining(loss, optimizer, EMAConfig(0.9), seed=1)
    state = create_state(create_network(params, optimizer, ema=True))
    batch = next(DrawnBatches(draw, 2, 0))
    records = []
    for step in range(steps):
        state, scalars = stage.train_step(state, frozen, batch, step)
        records.append({name: float(value) for name, value in scalars.items()})
    assert int(state.step) == steps
    finite = [v for r in records for n, v in r.items() if not n.startswith("band/")]
    assert np.isfinite(finite).all()
    return records, state.generator


@pytest.mark.slow
def test_the_video_vae_learns():
    loss, params = video_part()
    start = jax.tree.map(np.asarray, params)
    params = jax.tree.map(jnp.copy, params)  # training donates its state
    records, network = trained(loss, params, None, WorldWindows(WORLD).video(5), 40)
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert records[-1]["psnr"] > records[0]["psnr"]
    distance = jax.tree.map(lambda a, b: np.abs(a - b).max(), network.ema, start)
    assert min(jax.tree.leaves(distance)) > 0, "an average of all parameters is kept"


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing():
    loss, params = video_part()
    optimizer = make_optimizer(OptimizerConfig(1e-3))

    def broken(params, frozen, batch, key):
        value, scalars = loss(params, frozen, batch, key)
        return value + jnp.nan, scalars

    stage = Pretraining(broken, optimizer, EMAConfig(0.9))
    state = create_state(create_network(jax.tree.map(jnp.copy, params), optimizer, ema=True))
    batch = next(DrawnBatches(WorldWindows(WORLD).video(5), 2, 0))
    after, scalars = stage.train_step(state, None, batch, 0)
    assert np.isnan(scalars["loss"]) and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.generator.params, params)


@pytest.mark.slow
def test_the_causal_decoder_learns_from_the_pixels():
    _, params = video_part()
    loss = autoencoders.VideoLoss(VIDEO, LatentNoise(0.05, 0.0), ErrorLoss(0.3, 10.0), causal=True)
    start = {"decoder": jax.tree.map(jnp.copy, params["decoder"])}
    frozen = {"encoder": params["encoder"]}
    records, _ = trained(loss, start, frozen, WorldWindows(WORLD).video(5))
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


@pytest.mark.slow
def test_the_audio_vae_and_the_vocoder_learn():
    def draw(rng):  # a tone that begins somewhere
        time = np.arange(1600) / 16000
        tone = 0.3 * np.sin(2 * np.pi * 800 * time) * (time > rng.uniform(0.02, 0.05))
        return {"waveform": np.stack([tone, 0.5 * tone], -1).astype(np.float32)}

    params = autoencoders.init_audio_vae(AUDIO, jax.random.key(0))
    loss = autoencoders.AudioVAELoss(AUDIO, LatentNoise(), ErrorLoss(0.3, 0.1))
    records, network = trained(loss, params, None, draw, 60, 1e-2)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[-1]["mel_error"] < records[0]["mel_error"]
    statistics = {"mean": jnp.zeros(AUDIO.latent_width), "std": jnp.ones(AUDIO.latent_width)}
    vae = network.ema | {"per_channel_statistics": statistics}
    vocoder = autoencoders.init_vocoder(VOCODER, jax.random.key(0))
    records, _ = trained(autoencoders.VocoderLoss(VOCODER, AUDIO, 20.0), vocoder, vae, draw, 20)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]


def test_the_spectral_loss_hears_amplitude_and_pitch_but_no_phase():
    time = np.arange(4000) / 16000
    sine = lambda f, p=0.0, a=0.3: np.stack(2 * [a * np.sin(2 * np.pi * f * time + p)], -1)[None]  # noqa: E731
    distance = lambda x: float(autoencoders.spectral_loss(x, sine(500.0), 512, 128))  # noqa: E731
    assert distance(sine(500.0)) < 1e-3
    assert distance(sine(500.0, 1.0)) < 0.05
    assert distance(sine(500.0, a=0.2)) > 0.3
    assert distance(sine(800.0)) > 1.0


def test_statistics_normalise():
    rng = np.random.default_rng(0)
    parts = [rng.normal([1.0, -2.0], [0.5, 3.0], (4, 50, 2)) for _ in range(6)]
    found = autoencoders.channel_statistics(iter(parts))
    whole = np.concatenate(parts).reshape(-1, 2)
    np.testing.assert_allclose(found["mean"], whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["std"], whole.std(0), rtol=1e-5)
    with pytest.raises(ValueError, match=r"channels \[1\] are constant"):
        autoencoders.channel_statistics([np.stack([np.arange(5.0), np.ones(5)], -1)])
    with pytest.raises(ValueError, match="no latents"):
        autoencoders.channel_statistics([])


@functools.cache
def teacher_loss():
    config = TransformerConfig(
        num_layers=1, video_heads=2, video_head_dim=12, audio_heads=2, audio_head_dim=8,
        video_channels=4, audio_channels=6, caption_channels=8, video_context_dim=24,
        audio_context_dim=16,
    )  # fmt: skip
    tower = GemmaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=16, is_global=(True,), num_heads=2,
        num_kv_heads=1, head_dim=4, query_pre_attn_scalar=4.0, sliding_window=8,
    )  # fmt: skip
    connectors = ConnectorConfig(8, 2, 4, 2, 4, num_layers=1, num_registers=2, max_position=8)
    layout = BlockLayout.from_name("prefix", frame_rate=24.0)
    given = GivenInput(ConditionMixture(), ClipGeometry(2, 3, 2, 2), layout)
    loss = TeacherLoss(Transformer(config), connectors, TextTower(tower), given, LossWeights())
    params = jax.jit(lambda key: nn.unbox(init_boxed_params(tower, key)))(jax.random.key(7))
    return loss, {"tower": params}, init_teacher(loss, tower.num_states, jax.random.key(0))


def draw_latents(rng):
    length = int(rng.integers(2, 5))
    ids = np.concatenate([np.zeros(6 - length), [2], rng.integers(4, 12, length - 1)])
    return {
        "video": rng.standard_normal((8, 4)).astype(np.float16),
        "audio": rng.standard_normal((3, 6)).astype(np.float16),
        "ids": ids.astype(np.int32),
        "mask": np.arange(6) >= 6 - length,
    }


@pytest.mark.slow
def test_the_teacher_learns_with_its_connectors():
    loss, frozen, params = teacher_loss()
    start = jax.tree.map(np.asarray, params)
    params = jax.tree.map(jnp.copy, params)  # training donates its state
    records, network = trained(loss, params, frozen, draw_latents, 20, 1e-2)
    # noise - x0 has variance 2, and nothing is predicted at first
    assert records[0]["teacher/loss"] == pytest.approx(4.0, rel=0.5)
    assert min(r["teacher/loss"] for r in records[-5:]) < 0.9 * records[0]["teacher/loss"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), network.params, start)
    assert moved["connectors"]["projection"]["kernel"] > 0


def test_what_is_given_is_clean_and_not_learnt():
    """In each mode: told to the network as clean, no part of the loss, and no NaN in the loop."""
    loss, frozen, params = teacher_loss()
    # a network that says something: heads and modulations start at 0
    params = jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size)).reshape(x.shape), params)
    batch = next(DrawnBatches(draw_latents, 2, 0))
    clips = dict(batch)
    held_out = HeldOut(loss, frozen, clips, batch=2)
    found = held_out(params)
    assert found == held_out(params) and np.isfinite(list(found.values())).all()
    plain = [v for n, v in found.items() if n.split("_")[-1].startswith("0.")]
    assert len(plain) == 8 and found["heldout/mean"] == pytest.approx(np.mean(plain))
    # other sound: what is made to it changes, and nothing else of it can
    clips["audio"] = batch["audio"] + 1
    other = held_out(params)
    assert other["heldout/a2v_video"] != found["heldout/a2v_video"]
    assert other["heldout/v2a_audio"] != found["heldout/v2a_audio"]
    assert "heldout/a2v_audio" not in found and "heldout/v2a_video" not in found
    # all of a batch's clips given: their stream has no loss, which is no divergence
    mixture = ConditionMixture(t2av=0.0, v2a=1.0)
    given = dataclasses.replace(loss, given=dataclasses.replace(loss.given, mixture=mixture))
    (value, scalars), grads = jax.jit(jax.value_and_grad(given, has_aux=True))(
        params, frozen, batch, jax.random.key(0)
    )
    # not to the bit: XLA may fuse the two otherwise
    assert value == pytest.approx(float(scalars["teacher/loss_audio"]))
    assert np.isnan(scalars["teacher/loss_video"])
    assert may_be_missing("teacher/loss_video") and not may_be_missing("teacher/loss")
    head = grads["transformer"]["video_out"]["kernel"], grads["transformer"]["audio_out"]["kernel"]
    assert np.abs(head[0]).max() == 0 and np.abs(head[1]).max() > 0


def test_a_dropped_caption_is_the_empty_one():
    loss, frozen, params = teacher_loss()
    batch = next(DrawnBatches(draw_latents, 2, 0))
    mask = loss.kept(jnp.asarray(batch["mask"]), jnp.array([True, False]))
    assert mask.sum(1).tolist() == [1, batch["mask"][1].sum()]
    contexts_of = jax.jit(loss.contexts)
    contexts = contexts_of(params, frozen, batch["ids"], mask)
    empty_ids, empty_mask = np.zeros((2, 6), np.int32), np.arange(6)[None] == [[5], [5]]
    empty_ids[:, 5] = 2  # <bos>, at the right end as the tokenizer pads
    empty = contexts_of(params, frozen, empty_ids, empty_mask)
    for found, expected in zip(contexts, empty, strict=True):
        np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
        assert np.abs(found[1] - expected[0]).max() > 0.05


def test_noise_levels_are_shifted():
    loss, _, _ = teacher_loss()
    sigma = np.asarray(loss.draw_sigma(jax.random.key(0), 4000))
    assert sigma.min() > 0 and sigma.max() <= 1
    # P(σ < s) of the shifted ones is s / (s + e^μ (1 - s)); a tenth is uniform
    for s in (0.25, 0.5, 0.75):
        expected = 0.9 * s / (s + np.e * (1 - s)) + 0.1 * s
        assert (sigma < s).mean() == pytest.approx(expected, abs=0.03)


def test_latents_are_stored_once(tmp_path):
    """Shards that are there are not encoded again; other clips are refused."""
    seen = []

    class Encoder(latents.WorldEncoder):
        def encode(self, seeds):
            seen.extend(seeds)
            return np.full((len(seeds), 8, 4), seeds[0] + 1.0), np.ones((len(seeds), 3, 6))

    encoder = Encoder(PIPELINE, WORLD, ClipGeometry(2, 3, 2, 2), None, None)
    write = functools.partial(latents.write_latents, tmp_path, say=lambda _: None)
    write(encoder, 130, "a")
    assert seen == list(range(130))
    (tmp_path / "00001.npz").unlink()
    write(encoder, 131, "a")
    assert seen[130:] == [128, 129, 130]
    with pytest.raises(ValueError, match="other clips or encoders"):
        write(encoder, 131, "b")

    class Words:
        def encode_batch(self, captions, length):
            assert captions[0] == clip_caption(0, WORLD)
            return np.zeros((len(captions), length), np.int32), np.ones((len(captions), length))

    stored = latents.load_latents(tmp_path, 131, Words(), WORLD, 6)
    assert stored["video"].shape == (131, 8, 4) and stored["video"].dtype == np.float16
    element = latents.draw_row(stored, np.random.default_rng(0))
    assert {name: x.shape for name, x in element.items()} == {
        "video": (8, 4), "audio": (3, 6), "ids": (6,), "mask": (6,),
    }  # fmt: skip


def test_half_of_the_first_features_hear_where_a_sound_is():
    """The same sound on both sides leaves them as they are, swapped sides turn them around."""
    params = autoencoders.init_audio_vae(AUDIO, jax.random.key(0))["encoder"]["conv_in"]
    kernel, bias = params["kernel"], params["bias"]
    half = kernel.shape[-1] // 2
    left, right = kernel[..., 0, :], kernel[..., 1, :]
    np.testing.assert_array_equal(left[..., half:], -right[..., half:])
    assert not np.allclose(left[..., :half], -right[..., :half])
    np.testing.assert_allclose(bias[half:], 0.0, atol=1e-4)
    assert np.abs(bias[:half]).max() > 0.1


def test_a_new_vocoder_is_one_for_each_channel():
    """What is heard on one side moves the waveform of that side alone."""
    params = autoencoders.init_vocoder(VOCODER, jax.random.key(0))
    bins = VOCODER.mel_bins
    kernel = np.zeros_like(params["conv_post"]["kernel"])
    kernel[:, : len(kernel[0]) // 2, 0] = kernel[:, len(kernel[0]) // 2 :, 1] = 0.1
    params["conv_post"]["kernel"] = kernel
    module = autoencoders.vocoder_module(VOCODER)

    def sound(left, right):
        log_mel = jnp.stack([jnp.full((1, 4, bins), left), jnp.full((1, 4, bins), right)], -1)
        return np.asarray(module.apply({"params": params}, log_mel))

    both, left = sound(-2.0, -2.0), sound(-2.0, -9.0)
    np.testing.assert_allclose(both[..., 0], both[..., 1], atol=1e-6)
    np.testing.assert_allclose(left[..., 0], both[..., 0], atol=1e-6)
    assert np.abs(left[..., 1] - both[..., 1]).max() > 1e-3


def test_a_tone_never_played_weighs_more_than_noise_on_all():
    """Of four channels one is silent, or all have a quarter of that error: pooled, the same."""
    target = np.sin(np.arange(400) * 0.3)[None, :, None] * np.ones((2, 1, 2))
    silent = target.copy()
    silent[0, :, 0] = 0
    noisy = 0.5 * target
    pooled = [float(autoencoders._noise_ratio(x, target)) for x in (silent, noisy)]
    assert pooled[0] == pytest.approx(pooled[1])
    unheard = [float(autoencoders._unheard(x, target)) for x in (silent, noisy)]
    assert unheard[0] == pytest.approx(4 * unheard[1], rel=1e-3)
    assert float(autoencoders._unheard(target, target)) == 0
    quiet = np.zeros_like(target)  # a clip without a tone has no ratio, and divides by nothing
    assert np.isfinite(float(autoencoders._unheard(quiet, quiet)))
