"""Which tensors a checkpoint must hold, with official keys and shapes, from its metadata alone.

`expected_shapes(config, component)` is compared with the headers before anything is written, so a
damaged or unknown file is refused with a complete list of what is wrong with it.
"""

from checkpoint_converters.key_map import DIT
from omniforcing_jax.io.checkpoints import metadata_section
from omniforcing_jax.models.audio.vae import AudioVAEConfig
from omniforcing_jax.models.audio.vocoder import VocoderConfig
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.video_vae.model import VideoVAEConfig

# A size that the metadata does not tell: the number of text features, a multiple of the text
# encoder's width.
ANY = -1

# Absent settings take the defaults of LTX-2's own loader.
Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: dict, component: str) -> Shapes:
    """{official key: PyTorch shape} of one component.

    Args:
      config: the metadata's `config` object.
      component: transformer, connectors, video_vae, audio_vae or vocoder.

    Returns:
      Shapes; a size of `ANY` is not determined by the metadata.

    Raises:
      ValueError: a setting is missing or not supported; names it.
    """
    section = metadata_section(config, component)
    model, build = {
        "transformer": (TransformerConfig, _transformer),
        "connectors": (ConnectorConfig, _connectors),
        "video_vae": (VideoVAEConfig, _video_vae),
        "audio_vae": (AudioVAEConfig, _audio_vae),
        "vocoder": (VocoderConfig, _vocoder),
    }[component]
    try:
        model.from_metadata(config[section])  # refuses what the converted weights could not be
        return build(config[section])
    except KeyError as error:
        raise ValueError(f"config section {section!r} lacks {error}") from error


def _linear(key: str, out: int, width: int, bias: bool = True) -> Shapes:
    return {f"{key}.weight": (out, width)} | ({f"{key}.bias": (out,)} if bias else {})


def _conv(key: str, out: int, width: int, *kernel: int, bias: bool = True) -> Shapes:
    return {f"{key}.weight": (out, width, *kernel)} | ({f"{key}.bias": (out,)} if bias else {})


def _attention(key: str, query: int, context: int, inner: int, heads: int, gated: bool) -> Shapes:
    shapes = {f"{key}.q_norm.weight": (inner,), f"{key}.k_norm.weight": (inner,)}
    shapes |= _linear(f"{key}.to_q", inner, query)
    shapes |= _linear(f"{key}.to_k", inner, context)
    shapes |= _linear(f"{key}.to_v", inner, context)
    shapes |= _linear(f"{key}.to_out.0", query, inner)
    if gated:
        shapes |= _linear(f"{key}.to_gate_logits", heads, query)
    return shapes


def _feed_forward(key: str, width: int, bias: bool = True) -> Shapes:
    shapes = _linear(f"{key}.net.0.proj", 4 * width, width, bias)
    return shapes | _linear(f"{key}.net.2", width, 4 * width, bias)


def _adaln(key: str, width: int, rows: int) -> Shapes:
    shapes = _linear(f"{key}.emb.timestep_embedder.linear_1", width, 256)
    shapes |= _linear(f"{key}.emb.timestep_embedder.linear_2", width, width)
    return shapes | _linear(f"{key}.linear", rows * width, width)


def _transformer(t: dict) -> Shapes:
    heads = t["num_attention_heads"]
    audio_heads = t.get("audio_num_attention_heads", heads)
    video = heads * t["attention_head_dim"]
    audio = audio_heads * t["audio_attention_head_dim"]
    gated = t.get("apply_gated_attention", False)
    text_adaln = t.get("cross_attention_adaln", False)
    rows = 9 if text_adaln else 6

    shapes = _linear(DIT + "patchify_proj", video, t["in_channels"])
    shapes |= _linear(DIT + "audio_patchify_proj", audio, t.get("audio_in_channels", 128))
    shapes |= _linear(DIT + "proj_out", t["out_channels"], video)
    shapes |= _linear(DIT + "audio_proj_out", t["audio_out_channels"], audio)
    shapes[DIT + "scale_shift_table"] = (2, video)
    shapes[DIT + "audio_scale_shift_table"] = (2, audio)
    for prefix, width in (("", video), ("audio_", audio)):
        shapes |= _adaln(f"{DIT}{prefix}adaln_single", width, rows)
        if text_adaln:
            shapes |= _adaln(f"{DIT}{prefix}prompt_adaln_single", width, 2)
        if not t.get("caption_proj_before_connector", False):
            key = f"{DIT}{prefix}caption_projection"
            shapes |= _linear(f"{key}.linear_1", width, t["caption_channels"])
            shapes |= _linear(f"{key}.linear_2", width, width)
    shapes |= _adaln(DIT + "av_ca_video_scale_shift_adaln_single", video, 4)
    shapes |= _adaln(DIT + "av_ca_audio_scale_shift_adaln_single", audio, 4)
    shapes |= _adaln(DIT + "av_ca_a2v_gate_adaln_single", video, 1)
    shapes |= _adaln(DIT + "av_ca_v2a_gate_adaln_single", audio, 1)
    if t.get("use_keyframes_abs_pos_embedding", False):
        shapes[DIT + "keyframes_abs_pos_embedding"] = (1, video)
    if t.get("num_audio_sink_tokens", 0):
        shapes[DIT + "audio_sink_tokens"] = (1, t["num_audio_sink_tokens"], audio)

    text, audio_text = t["cross_attention_dim"], t["audio_cross_attention_dim"]
    block: Shapes = {}
    block |= _attention("attn1", video, video, video, heads, gated)
    block |= _attention("attn2", video, text, video, heads, gated)
    block |= _attention("audio_attn1", audio, audio, audio, audio_heads, gated)
    block |= _attention("audio_attn2", audio, audio_text, audio, audio_heads, gated)
    block |= _attention("audio_to_video_attn", video, audio, audio, audio_heads, gated)
    block |= _attention("video_to_audio_attn", audio, video, audio, audio_heads, gated)
    block |= _feed_forward("ff", video, t.get("ff_bias", True))
    block |= _feed_forward("audio_ff", audio)
    block["scale_shift_table"] = (rows, video)
    block["audio_scale_shift_table"] = (rows, audio)
    block["scale_shift_table_a2v_ca_video"] = (5, video)
    block["scale_shift_table_a2v_ca_audio"] = (5, audio)
    if text_adaln:
        block["prompt_scale_shift_table"] = (2, video)
        block["audio_prompt_scale_shift_table"] = (2, audio)
    for layer in range(t["num_layers"]):
        shapes |= {f"{DIT}transformer_blocks.{layer}.{k}": shape for k, shape in block.items()}
    return shapes


def _connectors(t: dict) -> Shapes:
    heads = t["connector_num_attention_heads"]
    head_dim = t["connector_attention_head_dim"]
    audio_heads = t.get("audio_connector_num_attention_heads", heads)
    audio_head_dim = t.get("audio_connector_attention_head_dim", head_dim)
    gated = t.get("connector_apply_gated_attention", False)
    widths = {"video": heads * head_dim, "audio": audio_heads * audio_head_dim}
    shapes: Shapes = {}
    if t.get("caption_proj_before_connector", False):
        for stream, width in widths.items():
            shapes |= _linear(f"text_embedding_projection.{stream}_aggregate_embed", width, ANY)
    else:
        key = "text_embedding_projection.aggregate_embed"
        shapes |= _linear(key, t["caption_channels"], ANY, bias=False)
    for stream, count in (("video", heads), ("audio", audio_heads)):
        width = widths[stream]
        key = f"{DIT}{stream}_embeddings_connector"
        shapes[f"{key}.learnable_registers"] = (t["connector_num_learnable_registers"], width)
        for layer in range(t["connector_num_layers"]):
            block = f"{key}.transformer_1d_blocks.{layer}"
            shapes |= _attention(f"{block}.attn1", width, width, width, count, gated)
            shapes |= _feed_forward(f"{block}.ff", width)
    return shapes


# sampler: (temporal stride) * (spatial stride)^2
_STRIDES = {"compress_space": 4, "compress_time": 2, "compress_all": 8}


def _vae_block(block: list, multiplier: int) -> tuple[str, dict]:
    """(kind, settings), with the multiplier that a sampler has where it names none."""
    name, settings = block
    settings = {"num_layers": settings} if isinstance(settings, int) else settings
    return name, {"multiplier": multiplier} | settings


def _res_blocks(key: str, count: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(count):
        for conv in ("conv1", "conv2"):
            shapes |= _conv(f"{key}.res_blocks.{i}.{conv}.conv", width, width, 3, 3, 3)
    return shapes


def _video_vae(v: dict) -> Shapes:
    pixels = v.get("patch_size", 4) ** 2
    latent = v.get("latent_channels", 128)
    shapes: Shapes = {
        "vae.per_channel_statistics.mean-of-means": (latent,),
        "vae.per_channel_statistics.std-of-means": (latent,),
    }
    # the reference ignores encoder_base_channels: the encoder starts as wide as the latents
    width = latent
    shapes |= _conv("vae.encoder.conv_in.conv", width, v.get("in_channels", 3) * pixels, 3, 3, 3)
    for i, block in enumerate(v["encoder_blocks"]):
        name, settings = _vae_block(block, multiplier=2)
        key = f"vae.encoder.down_blocks.{i}"
        if name == "res_x":
            shapes |= _res_blocks(key, settings["num_layers"], width)
            continue
        out = width * settings["multiplier"]
        stride = _STRIDES[name.removesuffix("_res")]
        shapes |= _conv(f"{key}.conv.conv", out // stride, width, 3, 3, 3)
        width = out
    shapes |= _conv("vae.encoder.conv_out.conv", latent + 1, width, 3, 3, 3)

    blocks = [_vae_block(block, multiplier=1) for block in reversed(v["decoder_blocks"])]
    width = v.get("decoder_base_channels", 128)
    for name, settings in blocks:
        width *= 1 if name == "res_x" else settings["multiplier"]
    shapes |= _conv("vae.decoder.conv_in.conv", width, latent, 3, 3, 3)
    for i, (name, settings) in enumerate(blocks):
        key = f"vae.decoder.up_blocks.{i}"
        if name == "res_x":
            shapes |= _res_blocks(key, settings["num_layers"], width)
            continue
        out = _STRIDES[name] * width // settings["multiplier"]
        shapes |= _conv(f"{key}.conv.conv", out, width, 3, 3, 3)
        width //= settings["multiplier"]
    out = v.get("out_channels", 3) * pixels
    return shapes | _conv("vae.decoder.conv_out.conv", out, width, 3, 3, 3)


def _audio_block(key: str, width: int, out: int) -> Shapes:
    shapes = _conv(f"{key}.conv1.conv", out, width, 3, 3)
    shapes |= _conv(f"{key}.conv2.conv", out, out, 3, 3)
    if width != out:
        shapes |= _conv(f"{key}.nin_shortcut.conv", out, width, 1, 1)
    return shapes


def _audio_vae(a: dict) -> Shapes:
    d = a["model"]["params"]["ddconfig"]
    widths = [d["ch"] * multiplier for multiplier in d["ch_mult"]]
    last = len(widths) - 1
    statistics = (d["z_channels"] * d["mel_bins"] // 2**last,)
    shapes: Shapes = {
        "audio_vae.per_channel_statistics.mean-of-means": statistics,
        "audio_vae.per_channel_statistics.std-of-means": statistics,
    }
    shapes |= _conv("audio_vae.encoder.conv_in.conv", d["ch"], d["in_channels"], 3, 3)
    width = d["ch"]
    for i, out in enumerate(widths):
        key = f"audio_vae.encoder.down.{i}"
        for j in range(d["num_res_blocks"]):
            shapes |= _audio_block(f"{key}.block.{j}", width, out)
            width = out
        if i < last:
            shapes |= _conv(f"{key}.downsample.conv", out, out, 3, 3)
    shapes |= _conv("audio_vae.encoder.conv_out.conv", 2 * d["z_channels"], width, 3, 3)
    shapes |= _conv("audio_vae.decoder.conv_in.conv", width, d["z_channels"], 3, 3)
    for coder in ("encoder", "decoder"):
        for i in (1, 2):
            shapes |= _audio_block(f"audio_vae.{coder}.mid.block_{i}", widths[-1], widths[-1])
    for i, out in reversed(list(enumerate(widths))):
        key = f"audio_vae.decoder.up.{i}"
        for j in range(d["num_res_blocks"] + 1):
            shapes |= _audio_block(f"{key}.block.{j}", width, out)
            width = out
        if i > 0:
            shapes |= _conv(f"{key}.upsample.conv.conv", out, out, 3, 3)
    return shapes | _conv("audio_vae.decoder.conv_out.conv", d["out_ch"], width, 3, 3)


def _snake(key: str, width: int) -> Shapes:
    return {
        f"{key}.act.alpha": (width,),
        f"{key}.act.beta": (width,),
        f"{key}.upsample.filter": (1, 1, 12),
        f"{key}.downsample.lowpass.filter": (1, 1, 12),
    }


def _wave_generator(key: str, g: dict) -> Shapes:
    snake = g.get("resblock") == "AMP1"
    channels = 2 if g.get("stereo", True) else 1
    width = g.get("upsample_initial_channel", 1024)
    shapes = _conv(f"{key}.conv_pre", width, channels * g.get("num_mels", 64), 7)
    kernels = g.get("resblock_kernel_sizes", [3, 7, 11])
    dilation_sizes = g.get("resblock_dilation_sizes", [[1, 3, 5]] * len(kernels))
    for i, size in enumerate(g.get("upsample_kernel_sizes", [16, 15, 8, 4, 4])):
        shapes[f"{key}.ups.{i}.weight"] = (width, width // 2, size)
        shapes[f"{key}.ups.{i}.bias"] = (width // 2,)
        width //= 2
        for j, (kernel, dilations) in enumerate(zip(kernels, dilation_sizes)):
            block = f"{key}.resblocks.{i * len(kernels) + j}"
            for n in range(len(dilations)):
                for half in (1, 2):
                    shapes |= _conv(f"{block}.convs{half}.{n}", width, width, kernel)
                    if snake:
                        shapes |= _snake(f"{block}.acts{half}.{n}", width)
    if snake:
        shapes |= _snake(f"{key}.act_post", width)
    bias = g.get("use_bias_at_final", True)
    return shapes | _conv(f"{key}.conv_post", channels, width, 7, bias=bias)


def _vocoder(v: dict) -> Shapes:
    if "bwe" not in v:
        return _wave_generator("vocoder", v)
    bwe = v["bwe"]
    shapes = _wave_generator("vocoder.vocoder", v["vocoder"])
    shapes |= _wave_generator("vocoder.bwe_generator", bwe)
    n_fft = bwe.get("n_fft", 512)
    frequencies = n_fft // 2 + 1
    shapes["vocoder.mel_stft.mel_basis"] = (bwe.get("num_mels", 64), frequencies)
    for basis in ("forward_basis", "inverse_basis"):
        shapes[f"vocoder.mel_stft.stft_fn.{basis}"] = (2 * frequencies, 1, n_fft)
    return shapes
