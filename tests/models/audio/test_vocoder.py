"""Vocoders: parity with the LTX-2 reference and diffusers, receptive field, settings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

from checkpoint_converters.reading import load_component
from omniforcing_jax.models.audio import bigvgan
from omniforcing_jax.models.audio.vocoder import (
    BandwidthExtensionConfig,
    HiFiGANConfig,
    VocoderConfig,
    vocode,
    vocoder_module,
)
from omniforcing_jax.models.audio.wave_layers import conv_transpose1d

PUBLISHED_BIGVGAN = HiFiGANConfig(
    resblock="AMP1",
    initial_channels=1536,
    upsample_rates=(5, 2, 2, 2, 2, 2),
    upsample_kernel_sizes=(11, 4, 4, 4, 4, 4),
    final_activation="clamp",
    final_bias=False,
)
PUBLISHED_BWE = HiFiGANConfig(
    resblock="AMP1",
    initial_channels=512,
    upsample_rates=(6, 5, 2, 2, 2),
    upsample_kernel_sizes=(12, 11, 4, 4, 4),
    final_activation="none",
    final_bias=False,
)


def to_log_mel(array):
    """[B, S, T, M] of the reference -> [B, T, M, S]."""
    return np.transpose(array, (0, 2, 3, 1))


def to_waveform(array):
    """[B, S, N] -> [B, N, S]."""
    return np.transpose(array, (0, 2, 1))


def load(golden_dir, version):
    expected = np.load(golden_dir / f"{version}_tiny_expected.npz")
    config = VocoderConfig.from_metadata(json.loads(str(expected["config_json"]))["vocoder"])
    params = load_component(golden_dir / f"{version}_tiny.safetensors", "vocoder", np.float32)
    return config, params, expected


@pytest.fixture(scope="module")
def hifigan(golden_dir):
    """(config, parameters, expected arrays) of the LTX-2.0 reference."""
    return load(golden_dir, "ltx2")


@pytest.fixture(scope="module")
def bigvgan_bwe(golden_dir):
    """(config, parameters, expected arrays) of the LTX-2.3 reference."""
    return load(golden_dir, "ltx23")


def small_generator(hop_rates, initial_channels=16, **settings):
    """A generator that compiles fast: one residual block per upsampling."""
    return HiFiGANConfig(
        initial_channels=initial_channels,
        upsample_rates=hop_rates,
        upsample_kernel_sizes=tuple(rate + 2 for rate in hop_rates),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
        **settings,
    )


def small_bwe(first_stage="clamp"):
    """LTX-2.3's two stages, small: 160 samples at 16 kHz, then 480 at 48 kHz per mel frame."""
    settings = {"resblock": "AMP1", "final_bias": False}
    extension = BandwidthExtensionConfig(
        small_generator((15, 16), final_activation="none", **settings), n_fft=256
    )
    first = small_generator((10, 16), final_activation=first_stage, **settings)
    return VocoderConfig(first, extension, sample_rate=48000)


def random_params(config, seed=0):
    """Parameters drawn on the host (compiling the initialisers takes longer than the tests)."""
    module = vocoder_module(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 64, 2)))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "filter":
            return np.asarray(bigvgan.kaiser_lowpass(None, leaf.shape))
        if name == "mel_basis":
            return rng.uniform(0.0, 0.1, leaf.shape).astype(np.float32)
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.1
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("mel", "waveform"), [("j_mel", "j_waveform"), ("h_dec_mel", "j_waveform_from_h_dec_mel")]
)
@pytest.mark.default_xla
def test_hifigan_matches_reference(hifigan, mel, waveform):
    config, params, expected = hifigan
    assert config.sample_rate == int(expected["j_sample_rate"]) == 24000
    ours = vocode(params, config, to_log_mel(expected[mel]))
    wanted = to_waveform(expected[waveform])
    assert ours.shape == wanted.shape == (1, expected[mel].shape[2] * config.hop, 2)
    np.testing.assert_allclose(ours, wanted, atol=5e-5, rtol=0)
    if mel == "j_mel":
        rough = vocode(params, config, to_log_mel(expected[mel]), jnp.bfloat16)
        assert rough.dtype == jnp.float32
        assert 30 < signal_to_noise(wanted, rough) < 60


def signal_to_noise(exact, rough):
    """In dB."""
    return 10 * np.log10(np.square(exact).mean() / np.square(rough - exact).mean())


def test_bigvgan_with_bandwidth_extension_matches_reference(bigvgan_bwe):
    """Every stage, and the loud clip that drives the first stage into its clamp."""
    config, params, expected = bigvgan_bwe
    assert config.sample_rate == int(expected["j_sample_rate"]) == 48000
    assert config.hop == 480
    log_mel = to_log_mel(np.concatenate([expected["j_mel"], expected["j_loud_mel"]]))
    module = vocoder_module(config)

    @jax.jit
    def stages(params, log_mel):
        variables = {"params": params}
        first = module.apply(variables, log_mel, method=lambda m, x: m.vocoder(x))
        second_mel = module.apply(variables, first, method=lambda m, x: m.mel_stft(x))
        residual = module.apply(variables, second_mel, method=lambda m, x: m.bwe_generator(x))
        skip = bigvgan.upsample_waveform(first, config.bandwidth_extension.ratio)
        return first, second_mel, residual, skip, vocode(params, config, log_mel)

    first, second_mel, residual, skip, waveform = stages(params, log_mel)
    second_mel_expected = np.transpose(expected["j_bwe_logmel"], (0, 3, 2, 1))
    loud_first = to_waveform(expected["j_loud_stage1_waveform_16k"])
    assert np.abs(loud_first).max() == 1.0
    for ours, wanted, atol in (
        (first[:1], to_waveform(expected["j_stage1_waveform_16k"]), 3e-4),
        (first[1:], loud_first, 3e-4),
        (second_mel[:1], second_mel_expected, 1e-3),
        (residual[:1], to_waveform(expected["j_bwe_residual"]), 3e-4),
        (skip[:1], to_waveform(expected["j_skip_resampled"]), 3e-4),
        (waveform[:1], to_waveform(expected["j_waveform"]), 3e-4),
        (waveform[1:], to_waveform(expected["j_loud_waveform"]), 3e-4),
    ):
        assert ours.shape == wanted.shape
        np.testing.assert_allclose(ours, wanted, atol=atol, rtol=0)


def test_resampler_filter_matches_reference(ltx23):
    wanted = ltx23["j_resampler_filter"].reshape(-1)
    np.testing.assert_allclose(bigvgan.resampler_filter(3), wanted, atol=1e-7, rtol=0)


def from_diffusers(state_dict):
    """Our tree from the state dict of a diffusers vocoder."""
    renames = {
        "conv_in": "conv_pre",
        "conv_out": "conv_post",
        "upsamplers": "ups",
        "resnets": "resblocks",
        "act_out": "act_post",
    }
    tree = {}
    for key, tensor in state_dict.items():
        key = key.replace("downsample.filter", "downsample.lowpass.filter")
        names = []
        for part in key.split("."):
            if part.isdigit():
                names[-1] += f"_{part}"
            else:
                names.append(renames.get(part, part))
        array = tensor.numpy()
        if names[-1] == "weight":
            names[-1] = "kernel"
            array = array.transpose((2, 0, 1) if names[-2].startswith("ups_") else (2, 1, 0))
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = array
    return tree


def randomise(module):
    """Random values for everything diffusers initialises to zero or to a formula."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith(("alpha", "beta")):
                tensor.normal_(0.0, 0.3)
            elif name.endswith("filter"):
                tensor.mul_(1 + 0.1 * torch.randn_like(tensor))
            elif name.endswith("mel_basis"):
                tensor.uniform_(0.0, 0.1)
            elif name.endswith(("forward_basis", "bias")):
                tensor.normal_(0.0, 0.1)


SMALL = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]]}


@pytest.mark.parametrize("width", [16, 18])  # 18 -> 9 -> 4: rounded down
def test_hifigan_matches_diffusers(width):
    torch.manual_seed(0)
    rates, kernels = [6, 4], [16, 8]
    reference = LTX2Vocoder(
        hidden_channels=width,
        upsample_factors=rates,
        upsample_kernel_sizes=kernels,
        resnet_kernel_sizes=[3, 7],
        resnet_dilations=[[1, 3], [1, 5]],
    )
    randomise(reference)
    config = VocoderConfig(
        HiFiGANConfig(
            initial_channels=width,
            upsample_rates=tuple(rates),
            upsample_kernel_sizes=tuple(kernels),
            resblock_kernel_sizes=(3, 7),
            resblock_dilation_sizes=((1, 3), (1, 5)),
        )
    )
    mel = torch.randn(2, 2, 11, 64)
    with torch.no_grad():
        wanted = to_waveform(reference(mel).numpy())
    ours = vocode(from_diffusers(reference.state_dict()), config, to_log_mel(mel.numpy()))
    assert np.std(wanted) > 0.05
    np.testing.assert_allclose(ours, wanted, atol=5e-5, rtol=0)


def test_bandwidth_extension_matches_diffusers():
    torch.manual_seed(0)
    config = small_bwe(first_stage="none")  # diffusers does not clamp the first stage
    extension = config.bandwidth_extension
    reference = LTX2VocoderWithBWE(
        hidden_channels=16,
        upsample_factors=list(config.generator.upsample_rates),
        upsample_kernel_sizes=list(config.generator.upsample_kernel_sizes),
        bwe_hidden_channels=16,
        bwe_upsample_factors=list(extension.generator.upsample_rates),
        bwe_upsample_kernel_sizes=list(extension.generator.upsample_kernel_sizes),
        filter_length=256,
        window_length=256,
        **SMALL,
        **{f"bwe_{name}": value for name, value in SMALL.items()},
    )
    randomise(reference)
    mel = torch.randn(2, 2, 11, 64)
    with torch.no_grad():
        wanted = to_waveform(reference(mel).numpy())
    ours = vocode(from_diffusers(reference.state_dict()), config, to_log_mel(mel.numpy()))
    assert np.std(wanted) > 0.02
    np.testing.assert_allclose(ours, wanted, atol=3e-4, rtol=0)


@pytest.mark.parametrize("rate, size", [(5, 11), (6, 16), (4, 8), (2, 2), (4, 2), (1, 3)])
def test_transposed_convolution_matches_torch(rate, size):
    """Values, and gradients of input and kernel."""
    rng = np.random.default_rng(0)
    x, kernel, bias, weight = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, 7, 3), (size, 3, 4), (4,), (2, 7 * rate, 4))
    )
    theirs = [torch.tensor(a, requires_grad=True) for a in (x, kernel, bias)]
    wanted = torch.nn.functional.conv_transpose1d(
        theirs[0].transpose(1, 2),
        theirs[1].permute(1, 2, 0),
        theirs[2],
        stride=rate,
        padding=max(0, (size - rate) // 2),
        output_padding=max(0, rate - size),
    ).transpose(1, 2)
    if size < rate:  # torch cannot crop less than nothing: its zeros come last
        wanted = wanted.roll((rate - size) // 2, 1)
    (wanted * torch.from_numpy(weight)).sum().backward()
    ours = conv_transpose1d(x, kernel, bias, rate)
    np.testing.assert_allclose(ours, wanted.detach().numpy(), atol=1e-5, rtol=0)
    gradients = jax.grad(lambda *args: (conv_transpose1d(*args, rate) * weight).sum(), (0, 1, 2))
    for ours, tensor in zip(gradients(x, kernel, bias), theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("version", ["ltx2", "ltx23"])
def test_module_parameters_are_the_checkpoint_tree(golden_dir, version):
    """`init` and the converter agree on every path and shape."""
    config, params, _ = load(golden_dir, version)
    if version == "ltx23":
        del params["mel_stft"]["stft_fn"]["inverse_basis"]  # in the file, used by nobody
    module = vocoder_module(config)
    fresh = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 64, 2)))["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, fresh)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)


def test_initial_filters_are_near_the_stored_ones(bigvgan_bwe):
    """The golden file's filters and bases deviate from the formulas by 1-2 % on purpose."""
    config, params, _ = bigvgan_bwe
    stft = params["mel_stft"]
    extension = config.bandwidth_extension
    fresh = bigvgan.CausalLogMel(extension.input_rate, extension.n_fft, extension.hop, 64).init(
        jax.random.key(0), jnp.zeros((1, 80, 2))
    )["params"]
    pairs = [
        (fresh["mel_basis"], stft["mel_basis"]),
        (fresh["stft_fn"]["forward_basis"], stft["stft_fn"]["forward_basis"]),
        (
            bigvgan.kaiser_lowpass(None, (1, 1, 12)),
            params["vocoder"]["act_post"]["upsample"]["filter"],
        ),
    ]
    for formula, stored in pairs:
        error = np.abs(np.asarray(formula) - stored).max() / np.abs(stored).max()
        assert 1e-4 < error < 0.06


def test_context_is_what_a_frame_reaches():
    """Changing one mel frame changes samples exactly as far as the contexts say."""
    hifigan = VocoderConfig(small_generator((6, 5, 2)))
    for config in (hifigan, small_bwe()):
        params = random_params(config)
        length = config.left_context + config.right_context + 3
        log_mel = np.random.default_rng(0).standard_normal((1, length, 64, 2)).astype(np.float32)
        changed = log_mel.copy()
        frame = config.right_context + 1
        changed[:, frame] += 3.0
        difference = vocode(params, config, changed) - vocode(params, config, log_mel)
        per_frame = np.abs(difference).reshape(length, -1).max(axis=1)
        # Frame i depends on i - left ... i + right, so `frame` reaches these
        first, last = frame - config.right_context, frame + config.left_context
        np.testing.assert_array_equal(per_frame[:first], 0.0)
        np.testing.assert_array_equal(per_frame[last + 1 :], 0.0)
        if config is hifigan:  # no filter taps close to zero at the edge of the field
            assert per_frame[first] > 0
            assert per_frame[last] > 0


def test_published_rates_and_contexts():
    """LTX-2.0 needs 18 mel frames on both sides."""
    hifigan = VocoderConfig()
    assert (hifigan.sample_rate, hifigan.hop) == (24000, 240)
    assert (hifigan.left_context, hifigan.right_context) == (18, 18)
    extended = VocoderConfig(
        PUBLISHED_BIGVGAN, BandwidthExtensionConfig(PUBLISHED_BWE), sample_rate=48000
    )
    assert (extended.sample_rate, extended.hop) == (48000, 480)
    assert (extended.left_context, extended.right_context) == (55, 52)


def test_always_fp32(hifigan):
    config, params, expected = hifigan
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    log_mel = to_log_mel(expected["j_mel"])
    ours = vocode(rounded, config, log_mel)  # the file is bfloat16: nothing is lost
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, to_waveform(expected["j_waveform"]), atol=5e-5, rtol=0)


def test_wrong_shapes_are_named():
    config = VocoderConfig()
    with pytest.raises(ValueError, match=r"\[B, T, 64, 2\]"):
        vocode({}, config, np.zeros((1, 5, 64, 1), np.float32))
    with pytest.raises(ValueError, match=r"\[B, T, 64, 2\]"):
        vocode({}, config, np.zeros((1, 2, 5, 64), np.float32))
    with pytest.raises(ValueError, match="0 frames"):
        vocode({}, config, np.zeros((1, 0, 64, 2), np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resblock", "2"),
        ("stereo", False),
        ("upsample_kernel_sizes", [16, 14, 8, 4, 4]),
        ("upsample_rates", [6, 5, 2]),
        ("upsample_initial_channel", 31),
        ("resblock_kernel_sizes", [3, 7, 10]),
        ("gain", 2.0),
    ],
)
def test_unsupported_hifigan_settings_are_named(ltx20, field, value):
    metadata = json.loads(str(ltx20["config_json"]))["vocoder"]
    metadata[field] = value
    with pytest.raises(ValueError, match=field):
        VocoderConfig.from_metadata(metadata)


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [
        ("vocoder", "activation", "snake"),
        ("vocoder", "gain", 2.0),
        ("bwe", "hop_length", 100),
        ("bwe", "win_size", 128),
        ("bwe", "num_mels", 80),
        ("bwe", "output_sampling_rate", 44100),
        ("bwe", "gain", 2.0),
    ],
)
def test_unsupported_bandwidth_extension_settings_are_named(ltx23, stage, field, value):
    metadata = json.loads(str(ltx23["config_json"]))["vocoder"]
    metadata[stage][field] = value
    with pytest.raises(ValueError, match=field):
        VocoderConfig.from_metadata(metadata)


def test_settings_of_the_checkpoints(ltx20, ltx23):
    config = VocoderConfig.from_metadata(json.loads(str(ltx20["config_json"]))["vocoder"])
    assert config.generator.final_activation == "tanh"
    assert config.generator.final_bias
    metadata = json.loads(str(ltx23["config_json"]))["vocoder"]
    config = VocoderConfig.from_metadata(metadata)
    assert config.generator.final_activation == "clamp"
    assert config.bandwidth_extension.generator.final_activation == "none"
    assert not config.generator.final_bias
    metadata["extra"] = {}
    with pytest.raises(ValueError, match="extra"):
        VocoderConfig.from_metadata(metadata)
