"""Attention backends against a float64 numpy reference and against each other."""

import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.ops import attention as attention_module
from omniforcing_jax.ops import splash
from omniforcing_jax.ops.attention import attention

LAYOUT, SINKS = BlockLayout.prefix(), 16
VIDEO_FRAMES, AUDIO_FRAMES, PATCHES = 10, 76, 30
ENDS = LAYOUT.kv_ends(VIDEO_FRAMES, AUDIO_FRAMES, PATCHES, SINKS)
LENGTHS = {"video": 300, "audio": 92}
# Query and key modality of each mask.
PAIRS = {
    "video": ("video", "video"),
    "audio": ("audio", "audio"),
    "a2v": ("video", "audio"),
    "v2a": ("audio", "video"),
}
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}


def make_inputs(q_len, kv_len, head_dim, dtype=jnp.float32, batch=2, heads=2):
    """q, k, v and an output cotangent."""
    rng = np.random.default_rng(q_len * kv_len + head_dim)
    lengths = (q_len, kv_len, kv_len, q_len)
    return tuple(
        jnp.asarray(rng.normal(size=(batch, length, heads, head_dim)), dtype) for length in lengths
    )


def run_with_gradients(q, k, v, cotangent, **kwargs):
    """Output, dq, dk, dv of `attention`."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, **kwargs), q, k, v)
        return out, *vjp(cotangent)

    return run(q, k, v, cotangent)


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance, err_msg=name)


def numpy_attention(q, k, v, mask, scale):
    """Float64 softmax attention, written without einsum broadcasting tricks."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            logits = q[b, :, n] @ k[b, :, n].T * scale  # [T, S]
            weights = np.where(mask[b, n], np.exp(logits), 0.0)
            total = weights.sum(axis=-1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            out[b, :, n] = weights @ v[b, :, n]
    return out


# The reference


@pytest.mark.parametrize("scale", [None, 0.3])
def test_xla_equals_numpy_for_a_text_mask(scale):
    q, k, v, _ = make_inputs(11, 7, 14, heads=3)
    valid = np.array([3, 7])[:, None] > np.arange(7)
    mask = valid[:, None, None, :]  # [B, 1, 1, S]
    out = attention(q, k, v, mask=mask, scale=scale)
    expected = numpy_attention(
        q, k, v, np.broadcast_to(mask, (2, 3, 11, 7)), 14**-0.5 if scale is None else scale
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_xla_equals_numpy_for_the_four_masks(name):
    queries, keys = PAIRS[name]
    q, k, v, _ = make_inputs(LENGTHS[queries], LENGTHS[keys], 10)
    dense = getattr(LAYOUT.masks(VIDEO_FRAMES, AUDIO_FRAMES, PATCHES, SINKS), name)
    expected = numpy_attention(q, k, v, np.broadcast_to(dense, (2, 2, *dense.shape)), 10**-0.5)
    for kwargs in ({"kv_end": getattr(ENDS, name)}, {"mask": dense}):
        out = attention(q, k, v, implementation="xla", **kwargs)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_rows_without_any_key_give_zeros_and_finite_gradients():
    q, k, v, cotangent = make_inputs(4, 5, 8)
    mask = np.ones((2, 1, 4, 5), bool)
    mask[1, :, 2] = False
    out, *gradients = run_with_gradients(q, k, v, cotangent, mask=mask)
    assert np.all(out[1, 2] == 0) and np.any(out[1, 1] != 0)
    assert all(np.isfinite(g).all() for g in gradients)
    assert np.all(gradients[0][1, 2] == 0)


def test_softmax_is_fp32_for_bf16_inputs():
    """Logits of a bf16 softmax near 200 would be rounded to whole numbers."""
    q = jnp.full((1, 1, 1, 8), 5.0, jnp.bfloat16)
    k = jnp.full((1, 2, 1, 8), 5.0, jnp.bfloat16).at[0, 1, 0, 0].add(0.0625)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 8))
    out = attention(q, k, v.astype(jnp.bfloat16), scale=1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.3125)), atol=2e-3)


# Backends against the reference, forward and backward


@pytest.mark.parametrize("name", PAIRS)
def test_prefix_equals_xla(name):
    queries, keys = PAIRS[name]
    inputs = make_inputs(LENGTHS[queries], LENGTHS[keys], 14)
    kv_end = getattr(ENDS, name)
    expected = run_with_gradients(*inputs, kv_end=kv_end, implementation="xla")
    actual = run_with_gradients(*inputs, kv_end=kv_end, implementation="prefix")
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"kv_end": ENDS.a2v},
        {"kv_length": jnp.array([20, 90])},
        {"bias": np.log(np.linspace(0.1, 1.0, 16, dtype=np.float32)).reshape(1, 4, 4)},
    ],
)
def test_chunked_equals_xla(monkeypatch, kwargs):
    """Several chunks, the last one padded; a head dim that no flash kernel takes."""
    monkeypatch.setattr(attention_module, "CHUNK", 64)
    inputs = make_inputs(LENGTHS["video"], LENGTHS["audio"], 160)
    expected = run_with_gradients(*inputs, **kwargs, implementation="xla")
    actual = run_with_gradients(*inputs, **kwargs, implementation="chunked")
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize(
    "name, head_dim, dtype",
    [
        ("video", 128, jnp.float32),
        ("a2v", 64, jnp.float32),
        ("v2a", 64, jnp.float32),
        ("a2v", 128, jnp.bfloat16),
    ],
)
def test_splash_equals_xla_for_kv_end(name, head_dim, dtype):
    queries, keys = PAIRS[name]
    inputs = make_inputs(LENGTHS[queries], LENGTHS[keys], head_dim, dtype)
    kv_end = getattr(ENDS, name)
    expected = run_with_gradients(*inputs, kv_end=kv_end, implementation="xla")
    actual = run_with_gradients(*inputs, kv_end=kv_end, implementation="splash")
    assert_close(actual, expected, TOLERANCE[dtype])
    assert actual[0].dtype == dtype


@pytest.mark.parametrize(
    "implementation, dtype",
    [("prefix", jnp.float32), ("splash", jnp.float32), ("splash", jnp.bfloat16)],
)
def test_kv_length_equals_xla(implementation, dtype):
    q, k, v, cotangent = make_inputs(40, 280, 64, dtype)

    @partial(jax.jit, static_argnums=1)
    def run(kv_length, implementation):
        def apply(q, k, v):
            return attention(q, k, v, kv_length=kv_length, implementation=implementation)

        out, vjp = jax.vjp(apply, q, k, v)
        return out, *vjp(cotangent)

    # Inside the first kernel block, at its border, in the last one, all.
    for kv_length in ([1, 37], [128, 129], [280, 64]):
        kv_length = jnp.asarray(kv_length)
        actual = run(kv_length, implementation)
        assert_close(actual, run(kv_length, "xla"), TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["xla", "prefix", "splash"])
def test_static_kv_length_and_no_mask(implementation):
    inputs = make_inputs(20, 50, 64)
    expected = run_with_gradients(*inputs, mask=np.arange(50)[None] < 33)
    for kv_length in (33, jnp.int32(33)):
        actual = run_with_gradients(*inputs, kv_length=kv_length, implementation=implementation)
        assert_close(actual, expected, 2e-5)
    expected = run_with_gradients(*inputs, mask=np.ones((1, 50), bool))
    actual = run_with_gradients(*inputs, implementation=implementation)
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "prefix", "splash"])
def test_no_gradient_reaches_hidden_keys(implementation):
    q, k, v, cotangent = make_inputs(LENGTHS["video"], LENGTHS["audio"], 64)
    start = LAYOUT.num_video_frames(1) * PATCHES
    block_1 = jnp.zeros_like(cotangent).at[:, start : start + 1].set(1.0)
    visible = ENDS.a2v[start]
    assert visible == SINKS + LAYOUT.num_audio_frames(2)
    _, dq, dk, dv = run_with_gradients(
        q, k, v, block_1 * cotangent, kv_end=ENDS.a2v, implementation=implementation
    )
    for gradient in (dk, dv):
        assert np.all(np.asarray(gradient[:, visible:]) == 0)
        assert np.all(np.abs(gradient[:, :visible]).max(axis=(2, 3)) > 0)
    assert np.all(np.asarray(dq[:, :start]) == 0) and np.any(np.asarray(dq[:, start]) != 0)

    @jax.jit
    def value_gradient(kv_length):
        def loss(v):
            out = attention(q, k, v, kv_length=kv_length, implementation=implementation)
            return jnp.sum(out * cotangent)

        return jax.grad(loss)(v)

    gradient = np.asarray(value_gradient(jnp.array([20, 90])))
    assert np.all(gradient[0, 20:] == 0) and np.all(gradient[1, 90:] == 0)
    assert np.all(np.abs(gradient[1, :90]).max(axis=(1, 2)) > 0)


def test_splash_inside_remat_and_scan():
    """The transformer scans over layers and rematerialises each: the kernel must survive both."""
    q, k, v, _ = make_inputs(92, 92, 64, batch=1, heads=1)

    def loss(q, implementation):
        @jax.checkpoint
        def layer(x, _):
            return x + attention(x, k, v, kv_end=ENDS.audio, implementation=implementation), None

        return jnp.mean(jax.lax.scan(layer, q, None, length=2)[0] ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(q, "splash"), gradient(q, "xla"), atol=1e-6)


# cuDNN needs an NVIDIA GPU; everything around the kernel call does not


@pytest.fixture
def cudnn_stand_in(monkeypatch):
    """Pretends to be on a GPU and runs the cuDNN calls on XLA; returns the list of calls."""
    calls = []
    dot_product_attention = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **kwargs):
        assert implementation == "cudnn"
        calls.append((q.shape[1], k.shape[1], set(kwargs)))
        return dot_product_attention(q, k, v, implementation="xla", **kwargs)

    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return calls


@pytest.mark.parametrize(
    "name, implementation",
    [("video", "cudnn"), ("a2v", "cudnn"), ("video", "prefix"), ("a2v", "auto"), ("v2a", "auto")],
)
def test_cudnn_decomposition(cudnn_stand_in, name, implementation):
    queries, keys = PAIRS[name]
    inputs = make_inputs(LENGTHS[queries], LENGTHS[keys], 64, jnp.bfloat16)
    kv_end = getattr(ENDS, name)
    expected = attention(*inputs[:3], kv_end=kv_end, implementation="xla")
    assert not cudnn_stand_in
    actual = attention(*inputs[:3], kv_end=kv_end, implementation=implementation)
    np.testing.assert_allclose(
        actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2
    )
    # One call per block that is long enough, on ever longer keys, with neither mask nor bias.
    blocks = zip(*np.unique(kv_end, return_counts=True), strict=True)
    long = [(rows, end) for end, rows in blocks if min(rows, end) >= 64]
    assert [call[:2] for call in cudnn_stand_in] == long
    assert len(long) == {"video": 3, "a2v": 2, "v2a": 0}[name]
    assert all(call[2] <= {"scale", "key_value_seq_lengths"} for call in cudnn_stand_in)


@pytest.mark.parametrize("kv_length", [70, np.int32(100), jnp.int32(37), jnp.array([1, 100])])
def test_cudnn_kv_length(cudnn_stand_in, kv_length):
    inputs = make_inputs(64, 100, 64, jnp.bfloat16)
    expected = run_with_gradients(*inputs, kv_length=kv_length, implementation="xla")
    actual = run_with_gradients(*inputs, kv_length=kv_length, implementation="auto")
    assert_close(actual, expected, 2e-2)
    assert len(cudnn_stand_in) == 1


@pytest.mark.parametrize(
    "options",
    [{"kv_end": ENDS.video}, {"kv_length": np.int32(100)}, {"kv_length": np.array([70, 300])}],
    ids=["blocks", "length", "lengths"],
)
def test_cudnn_itself(options):
    """The kernel that the tests above stand in for: JAX_PLATFORMS=cuda pytest -k cudnn_itself."""
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs an NVIDIA GPU")
    inputs = make_inputs(LENGTHS["video"], LENGTHS["video"], 64, jnp.bfloat16)
    expected = run_with_gradients(*inputs, implementation="xla", **options)
    assert_close(run_with_gradients(*inputs, implementation="cudnn", **options), expected, 2e-2)


@pytest.mark.parametrize("lengths", [(384, 1), (25, 384)])
def test_few_queries_or_keys_are_not_for_cudnn(cudnn_stand_in, lengths):
    inputs = make_inputs(*lengths, 64, jnp.bfloat16)
    expected = run_with_gradients(*inputs, implementation="xla")
    for implementation in ("auto", "prefix", "cudnn"):
        assert_close(run_with_gradients(*inputs, implementation=implementation), expected, 2e-2)
    assert not cudnn_stand_in


def test_cudnn_refusals(cudnn_stand_in, monkeypatch):
    half = make_inputs(8, 8, 64, jnp.bfloat16)[:3]
    with pytest.raises(ValueError, match="'cudnn' attention needs bfloat16 or float16"):
        attention(*make_inputs(8, 8, 64)[:3], implementation="cudnn")
    with pytest.raises(ValueError, match="head dim that is a multiple of 8 and at most 128"):
        attention(*make_inputs(8, 8, 20, jnp.bfloat16)[:3], implementation="cudnn")
    # auto finds another way instead
    attention(*make_inputs(8, 8, 20, jnp.bfloat16)[:3])
    attention(*make_inputs(8, 8, 64)[:3], kv_end=np.full(8, 3))
    with pytest.raises(ValueError, match="runs on TPU"):
        attention(*half, implementation="splash")
    assert not cudnn_stand_in
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"NVIDIA GPU.*'cpu'; use 'prefix', 'xla' or 'auto'"):
        attention(*half, implementation="cudnn")


# Choice of the implementation, sharding, lowering


def test_auto_choice(monkeypatch):
    chosen = []

    def chooses(name):
        def run(q, *args, **options):
            chosen.append(name.format(args[-1]))
            return q

        return run

    monkeypatch.setattr(attention_module, "_masked_xla", chooses("xla"))
    monkeypatch.setattr(attention_module, "_prefix", chooses("prefix/{}"))
    monkeypatch.setattr(attention_module, "_chunked", chooses("chunked"))
    monkeypatch.setattr(attention_module.splash, "splash_attention", chooses("splash"))

    def choice(platform, dtype=jnp.bfloat16, head_dim=128, length=128, keys=128, **kwargs):
        monkeypatch.setattr(attention_module, "platform", lambda: platform)
        attention(*make_inputs(length, keys, head_dim, dtype)[:3], **kwargs)
        return chosen.pop()

    kv_end = np.full(128, 7)
    mask = np.ones((1, 1, 1, 128), bool)
    assert choice("cpu") == "xla"
    assert choice("cpu", kv_end=kv_end) == "prefix/xla"
    assert choice("gpu") == "prefix/cudnn"
    assert choice("gpu", kv_end=kv_end) == "prefix/cudnn"
    # dense logits would be large, and these have no flash kernel
    for refused in ({"dtype": jnp.float32}, {"head_dim": 256}):
        assert choice("gpu", **refused) == choice("gpu", kv_end=kv_end, **refused) == "chunked"
    assert choice("absent gpu") == choice("absent gpu", kv_end=kv_end) == "chunked"
    for platform in ("gpu", "absent gpu"):
        for short in ({"length": 25}, {"keys": 1}):
            assert choice(platform, **short) == choice(platform, jnp.float32, **short) == "xla"
    assert choice("tpu", kv_end=kv_end) == "splash"
    assert choice("tpu", kv_length=jnp.int32(5)) == "splash"
    assert choice("tpu", head_dim=32, kv_end=kv_end) == "prefix/xla"
    assert choice("tpu", length=25) == "xla"
    for platform in ("cpu", "gpu", "tpu"):
        assert choice(platform, mask=mask) == choice(platform, head_dim=256, mask=mask) == "xla"


def tpu_mesh(sizes, names):
    return AbstractMesh(
        sizes,
        names,
        axis_types=(AxisType.Auto,) * len(names),
        abstract_device=AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu"),
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_splash_lowers_for_tpu(head_dim):
    """Mosaic accepts forward and backward kernels at production length, under a mesh."""
    ends = LAYOUT.kv_ends(16, 126, 384, SINKS)
    video = jax.ShapeDtypeStruct((4, 6144, 4, head_dim), jnp.bfloat16)
    audio = jax.ShapeDtypeStruct((4, 142, 4, head_dim), jnp.bfloat16)

    def loss(q, k, v):
        whole_clip = attention(q, k, v, kv_end=ends.a2v)
        cached = attention(q, k, v, kv_length=jnp.int32(42))
        return jnp.sum(whole_clip.astype(jnp.float32) * cached.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    mesh = tpu_mesh((2, 2, 1, 2), ("data", "fsdp", "sequence", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = gradient.trace(video, audio, audio).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert text.count("tpu_custom_call") == 6, "forward, dq and dkv of two calls"
    assert "6144x142" not in text, "a dense mask or logits tensor was materialised"


def test_splash_equals_xla_on_a_mesh():
    """Batch over data and fsdp, heads over tensor; sizes that do not divide are replicated."""
    script = """
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        import numpy as np
        from jax.sharding import AxisType
        from omniforcing_jax.ops.attention import attention
        from tests.ops.test_attention import ENDS, assert_close, make_inputs, run_with_gradients

        names = ("data", "fsdp", "sequence", "tensor")
        mesh = jax.make_mesh((2, 2, 1, 2), names, axis_types=(AxisType.Auto,) * 4)
        for batch, heads in ((4, 2), (2, 1)):
            inputs = make_inputs(92, 92, 64, batch=batch, heads=heads)
            lengths = np.linspace(1, 92, batch, dtype=np.int32)
            for kwargs in ({"kv_end": ENDS.audio}, {"kv_length": lengths}):
                expected = run_with_gradients(*inputs, **kwargs, implementation="xla")
                with jax.set_mesh(mesh):
                    actual = run_with_gradients(*inputs, **kwargs, implementation="splash")
                assert_close(actual, expected, 2e-5)
            print(batch, actual[0].sharding.shard_shape(actual[0].shape))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # With batch 2 only `data` divides; one head cannot be split.
    assert result.stdout.split("\n")[:2] == ["4 (1, 92, 1, 64)", "2 (1, 92, 1, 64)"]


def test_masks_with_equal_content_are_equal():
    first = splash.BlockCausalMask(ENDS.audio, 128)
    same = splash.BlockCausalMask(ENDS.audio.copy(), 128)
    assert first == same and hash(first) == hash(same)
    assert first != splash.BlockCausalMask(ENDS.audio, 256)
    assert first != splash.BlockCausalMask(np.maximum(ENDS.audio, 18), 128)
    assert first.mask_function is same.mask_function


@pytest.mark.parametrize(
    "length, expected",
    [(1, (128, 128)), (300, (384, 384)), (1152, (384, 1152)), (6144, (1024, 6144)),
     (9600, (640, 9600))],
)  # fmt: skip
def test_splash_padding(length, expected):
    block, padded = splash._block_and_padded(length)
    assert (block, padded) == expected
    backward = splash._backward_block(padded)
    assert padded % backward == backward % 128 == 0 and backward <= 512


# Input checks and FLOPs


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"kv_end": np.array([1, 2, 0])}, r"kv_end must lie in 1\.\.5.*got 0\.\.2"),
        ({"kv_end": np.array([1, 2, 6])}, r"kv_end must lie in 1\.\.5.*got 1\.\.6"),
        ({"kv_end": np.array([1, 2])}, r"kv_end must have shape \(3,\), got \(2,\)"),
        ({"kv_end": jnp.array([1, 2, 3])}, "kv_end must be a numpy int array"),
        ({"kv_end": np.array([1.0, 2, 3])}, "kv_end must be a numpy int array"),
        ({"kv_length": 0}, r"kv_length must be in 1\.\.5, got 0"),
        ({"kv_length": 6}, r"kv_length must be in 1\.\.5, got 6"),
        ({"kv_length": jnp.ones(3, int)}, r"scalar or have shape \(2,\), got \(3,\)"),
        ({"mask": np.ones((2, 1, 3, 4), bool)}, "mask must be bool and broadcastable"),
        ({"mask": np.ones((2, 1, 3, 5))}, "mask must be bool and broadcastable"),
        ({"kv_length": 2, "kv_end": np.array([1, 2, 3])}, "at most one of"),
        ({"bias": np.zeros((1, 2, 2), np.float32)}, "G a divisor of 3 queries and 5 keys"),
        ({"bias": np.zeros((1, 1, 1)), "implementation": "splash"}, "takes no bias"),
        ({"mask": np.ones((3, 5), bool), "implementation": "splash"}, "takes no dense mask"),
        ({"mask": np.ones((3, 5), bool), "implementation": "prefix"}, "takes no dense mask"),
        ({"implementation": "flash"}, "unknown implementation 'flash'; known"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    q, k, v, _ = make_inputs(3, 5, 8)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **kwargs)


def test_bad_shapes_are_refused():
    q, k, v, _ = make_inputs(3, 5, 8)
    with pytest.raises(ValueError, match=r"expected q \[B, T, N, H\]"):
        attention(q, k, v[:, :4])
    with pytest.raises(ValueError, match="differ in batch, heads or head dim"):
        attention(q[:1], k, v)
    with pytest.raises(ValueError, match="must share a dtype"):
        attention(q.astype(jnp.bfloat16), k, v)
    q, k, v, _ = make_inputs(300, 300, 8)
    with pytest.raises(ValueError, match=r"300 times.*use 'splash' or 'xla'"):
        attention(q, k, v, kv_end=np.arange(1, 301), implementation="prefix")
