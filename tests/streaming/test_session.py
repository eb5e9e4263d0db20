"""The live session: replay, snapshots, prompts, and equality with the scan."""

import dataclasses
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from checkpoint_converters import synthetic
from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.audio import vocoder
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.pipeline import PipelineConfig, load_pipeline
from omniforcing_jax.sampling import student
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.serving.events import Limits, Made
from omniforcing_jax.serving.load import Load
from omniforcing_jax.serving.runtime import Runtime
from omniforcing_jax.serving.service import SessionRequest
from omniforcing_jax.serving.snapshots import SessionKeeper, SnapshotStore
from omniforcing_jax.serving.turn_log import TurnLog
from omniforcing_jax.streaming import block_maker, steering
from omniforcing_jax.streaming.block_programs import generate_block, jitted_prompt_kv
from omniforcing_jax.streaming.session import Chunk
from omniforcing_jax.streaming.turns import Turn, turns_from_json, turns_to_json
from omniforcing_jax.training.metrics import num_compilations


@pytest.fixture(scope="module")
def pipeline(random_pipeline):
    return random_pipeline("2.0")


def make_config(pipeline, layout="prefix", rate=24.0, **cache) -> RolloutConfig:
    return RolloutConfig(
        cache=CacheConfig(pipeline.config.layout(layout, rate), **{"window": 2, **cache}),
        sigmas=(1.0, 0.7, 0.0),
        height=2,
        width=2,
    )


def contexts(pipeline, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    dims = pipeline.config.transformer.text_dims
    return tuple(jax.random.normal(k, (1, 16, d)) for k, d in zip(keys, dims, strict=True))


def session(pipeline, config=None, *, seed=0, decode_mode="causal", **options):
    config = config or make_config(pipeline)
    return pipeline.session(
        config, contexts(pipeline), seed=seed, decode_mode=decode_mode, **options
    )


def join(chunks):
    chunks = list(chunks)
    frames = np.concatenate([c.frames for c in chunks], axis=1)
    return frames, np.concatenate([c.waveform for c in chunks], axis=1)


def test_equals_offline_rollout_and_full_decode(pipeline):
    """Frames and sound of a causal stream are those of the scan's latents, decoded at once."""
    config = make_config(pipeline)
    frames, waveform = join(session(pipeline, config, seed=3).stream(4))
    model = pipeline.transformer()
    how = {"levels": config.sigma_levels, "dtype": config.cache.dtype}
    text = jitted_prompt_kv(model, pipeline.params["transformer"], *contexts(pipeline), **how)
    latents = student.rollout(
        model,
        pipeline.params["transformer"],
        text,
        config.rope(model, 4),
        jax.random.key(3),
        config=config,
        num_blocks=4,
        batch=1,
    )
    video = latents.video.reshape(1, -1, config.height, config.width, latents.video.shape[-1])
    decode = jax.jit(video_vae.decode, static_argnums=0, static_argnames="causal")
    full = decode(pipeline.config.video_vae, pipeline.params["video_vae"], video, causal=True)
    expected = np.asarray((full + 1) * 127.5)
    assert np.abs(frames - np.clip(expected, 0, 255)).max() < 0.6  # half a grey level of rounding
    log_mel = audio_vae.decode_audio(
        pipeline.params["audio_vae"], pipeline.config.audio_vae, latents.audio
    )
    vocode = jax.jit(vocoder.vocode, static_argnums=1)
    expected = vocode(pipeline.params["vocoder"], pipeline.config.vocoder, log_mel)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(waveform, expected, atol=1e-4)


def test_what_is_said_replays_from_its_log(pipeline):
    """Rewound, given another seed, fewer steps, a blended prompt and a recache; also as text."""
    config, log, found = make_config(pipeline), [], []
    how = {"seed": 1, "decode_mode": "window", "steerable": True}
    live = session(pipeline, config, log=log.append, **how)
    found += [live.step() for _ in range(3)]
    live.rewind(2)  # what follows is nearly what came before
    pending = [live.begin(), live.begin()]  # the second is begun before the first is looked at
    live.set_prompt(contexts(pipeline, seed=1), blend=2)
    pending += [live.begin(), live.begin()]
    found += [block.chunk() for block in pending]
    assert [chunk.block for chunk in found] == [0, 1, 2, 2, 3, 4, 5]
    decoded = [pipeline.config.video_vae.pixel_frames(3 * n + 1) for n in range(6)]
    again = np.concatenate([chunk.frames for chunk in found[:4]], axis=1)
    again = again[:, decoded[2] : decoded[2] + 8], again[:, decoded[1] : decoded[1] + 8]
    assert np.abs(again[0].astype(int) - again[1]).mean() < 2
    live.rewind(4)
    live.set_seed(9)
    live.set_steps(1)
    live.set_prompt(contexts(pipeline, seed=2), recache=True)
    found += [live.step(), live.step(), live.finish()]
    # every course is shown to its end, in picture and sound
    assert live.num_frames == decoded[2] + (decoded[5] - decoded[1]) + (decoded[5] - decoded[3])
    samples = [240 * (4 * (1 + 25 * n) - 3) for n in range(6)]
    assert live.num_samples == samples[2] + (samples[5] - samples[1]) + (samples[5] - samples[3])
    assert [(turn.kind, turn.block) for turn in log] == [
        ("rewind", 3), ("prompt", 5), ("rewind", 7), ("seed", 7), ("steps", 7), ("prompt", 7)
    ]  # fmt: skip
    other = session(pipeline, config, **how)
    other.add(*turns_from_json(turns_to_json(log)))
    replayed = join([*(other.step() for _ in range(9)), other.finish()])
    for a, b in zip(replayed, join(found), strict=True):
        np.testing.assert_array_equal(a, b)
    other = session(pipeline, config, **how)
    for turn in (t for t in log if t.kind != "steps"):
        other.add(turn)
    shown = join([*(other.step() for _ in range(9)), other.finish()])
    assert np.array_equal(shown[0][:, :100], replayed[0][:, :100])
    assert not np.array_equal(shown[0], replayed[0]), "fewer steps are another picture"


def test_rewinds_that_cannot_be(pipeline):
    live = session(pipeline, steerable=True)
    live.rewind(3)
    with pytest.raises(ValueError, match="block 3 cannot be gone back to: 0 are made"):
        live.step()
    live.step()  # without it
    for turn in (Turn("rewind", {"block": -1}), Turn("steps", {"steps": 3})):
        with pytest.raises(ValueError, match=r"at (least 0|most 2)"):
            live.add(turn)
    with pytest.raises(ValueError, match="'rewind' is for sessions that are steerable"):
        session(pipeline).rewind(0)
    with pytest.raises(ValueError, match="'recache' is for sessions"):
        session(pipeline).set_prompt(contexts(pipeline), recache=True)


def test_snapshot_continues_bit_for_bit(pipeline):
    live = session(pipeline, seed=5)
    for _ in range(3):
        live.step()
    snapshot = pickle.loads(pickle.dumps(live.snapshot()))
    expected = join([live.step() for _ in range(3)])
    end = live.snapshot()
    live.restore(snapshot)  # the same compiled programs: the same bits
    assert live.num_blocks == 3
    compiled = num_compilations()
    for a, b in zip(expected, join([live.step() for _ in range(3)]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert num_compilations() == compiled
    # Another session has its own decoders, but shares the block step.
    fresh = session(pipeline, seed=99)
    fresh.restore(snapshot)
    assert fresh.num_blocks == 3
    frames, waveform = join([fresh.step() for _ in range(3)])
    jax.tree.map(np.testing.assert_array_equal, fresh.snapshot()["cache"], end["cache"])
    # XLA's CPU compiler does not always make the same code of the same program: rounding only.
    assert np.abs(frames.astype(int) - expected[0]).max() <= 1
    assert np.mean(frames != expected[0]) < 1e-3
    np.testing.assert_allclose(waveform, expected[1], atol=1e-5)


def test_new_prompt_at_a_block_border(pipeline, monkeypatch):
    same, changed = session(pipeline), session(pipeline)
    for _ in range(2):
        np.testing.assert_array_equal(same.step().frames, changed.step().frames)
    encoded, encode = [], steering.jitted_prompt_kv
    monkeypatch.setattr(
        steering,
        "jitted_prompt_kv",
        lambda *args, **kwargs: encoded.append(0) or encode(*args, **kwargs),
    )
    changed.set_prompt(contexts(pipeline, seed=1))
    assert not np.array_equal(same.step().frames, changed.step().frames)
    changed.set_prompt(contexts(pipeline, seed=0))
    assert changed.step().frames.shape == same.step().frames.shape
    changed.step()
    assert len(encoded) == 2, "text keys and values are made once per prompt"


class Sentences:
    """Has what a session uses of a `PromptEncoder`; takes two seconds, by a clock of its own."""

    def __init__(self, **known):
        self.known, self.now = known, 0.0

    def contexts(self, prompt):
        self.now += 2
        return self.known[prompt]


def test_sentences(pipeline, monkeypatch):
    """They give what their contexts give, and their time is that of the next block."""
    prompts = Sentences(sea=contexts(pipeline), storm=contexts(pipeline, seed=1))
    clock = types.SimpleNamespace(perf_counter=lambda: prompts.now)
    monkeypatch.setattr(steering, "time", clock)
    config = make_config(pipeline)
    expected = session(pipeline)
    live = pipeline.session(config, "sea", prompts=prompts, decode_mode="causal")
    for prompt in (None, None, "storm"):
        if prompt is not None:
            live.set_prompt(prompt)
            expected.set_prompt(contexts(pipeline, seed=1))
        chunk = live.step()
        np.testing.assert_array_equal(chunk.frames, expected.step().frames)
        assert chunk.timings.text == 2 * (chunk.block in (0, 2))
    with pytest.raises(ValueError, match=r"'fog' is a sentence.*prompts=PromptEncoder"):
        expected.set_prompt("fog")
    with pytest.raises(ValueError, match="is a sentence"):
        pipeline.session(config, "sea")


def test_what_a_server_has_logged_replays(random_checkpoint, tmp_path):
    """Turns that came at any time, steps left out under load, a pause on the disk, and a death; of
    weights and a cache in int8, which a rewind writes anew."""
    pipeline = load_pipeline(random_checkpoint("2.0"), dtype=jnp.float32, quantize="int8")
    prompts = Sentences(sea=contexts(pipeline), storm=contexts(pipeline, seed=1))
    store, found = SnapshotStore(tmp_path, 1 << 30, "this model"), []

    def open_stream(request):
        log, snapshot = request.log, request.snapshot
        how = {"seed": log.seed, "prompts": prompts, "decode_mode": "window", "steerable": True}
        config = make_config(pipeline, dtype="int8")
        live = pipeline.session(config, log.prompt, log=log.append, **how)
        if snapshot is not None:
            live.restore(snapshot)
        return live

    runtime = Runtime(
        open_stream,
        24.0,
        Limits(lead=1e6),
        Load(2, 1, {2: 5.0}),  # too slow for two steps
        SessionKeeper(store, every=0.0),  # at each block, if the last copy is written
        clock=lambda: 0.0,
    )

    def run(seat, blocks):
        seat.taken(1e6)
        while len(found) < blocks:
            runtime.advance()
            for thread in (runtime._opener, runtime._saver):  # a copy is written at each block
                thread.submit(int).result(600)

    def hear(event):
        found.extend([event.chunk] if isinstance(event, Made) else [])

    seat = runtime.join(SessionRequest(TurnLog("its name", "sea", 3, False)), hear)
    run(seat, 3)
    seat.set_prompt("storm", blend=1)
    run(seat, 6)
    seat.rewind(2)
    run(seat, 8)
    log, snapshot = store.read("its name")  # as if the process had died in the next moment
    (made,) = log.taken_up
    run(seat, made + 1)
    revived = open_stream(SessionRequest(log, snapshot)).step()
    for a, b in zip(join([revived]), join([found[made]]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert made > 6 and all(turn.block < made for turn in log.turns)
    seat.leave(keep=True)
    runtime.advance()
    runtime._saver.submit(int).result(600)
    log, snapshot = store.read("its name")
    run(runtime.join(SessionRequest(log, snapshot), hear), len(found) + 2)
    log = TurnLog.from_json(log.to_json())
    assert [turn.kind for turn in log.turns] == ["steps", "prompt", "rewind"]
    other = open_stream(SessionRequest(TurnLog("", log.prompt, log.seed, False)))
    other.add(*log.turns)
    replayed = join([other.step() for _ in found])
    for a, b in zip(join(found), replayed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_runs_past_its_window_without_recompiling(pipeline):
    live = session(pipeline, make_config(pipeline, window=1))
    for _ in range(4):
        live.step()
    compiled = generate_block._cache_size()
    sizes = {live.step().frames.shape for _ in range(8)}
    assert generate_block._cache_size() == compiled
    assert len(sizes) == 1
    # the cache has not grown: block 0, the window, and the slot of the block that is made
    assert live.snapshot()["cache"].kv[0].video.k.shape[1] == (1 + 3 + 3) * 4


@pytest.mark.slow
def test_clocks_after_two_hundred_seconds(pipeline):
    live = session(pipeline, make_config(pipeline, window=3, anchors=1))
    shape = jax.tree.map(np.shape, live.snapshot()["cache"])
    for _ in range(201):
        chunk = live.step()
        assert np.isfinite(chunk.waveform).all() and chunk.frames.std() > 0
    assert live.num_frames == 200 * 24 + 1
    assert live.num_samples == (4 * (1 + 200 * 25) - 3 - 18) * 240
    assert jax.tree.map(np.shape, live.snapshot()["cache"]) == shape


@pytest.mark.slow
def test_modulated_text_attention(random_pipeline):
    """LTX-2.3: text keys depend on the noise level; 48 kHz sound."""
    pipeline = random_pipeline("2.3")
    live = session(pipeline, make_config(pipeline, "merged"))
    chunk = live.step()
    assert chunk.frames.shape[1] == 25 and chunk.frames.std() > 0
    assert pipeline.config.vocoder.sample_rate == 48000


def test_bad_input_is_refused(pipeline):
    with pytest.raises(ValueError, match="positions='relative'"):
        session(pipeline, make_config(pipeline, positions="absolute"))
    live = session(pipeline, max_blocks=1)
    with pytest.raises(ValueError, match="text context has shape"):
        live.set_prompt(tuple(c[..., :-1] for c in contexts(pipeline)))
    live.step()
    with pytest.raises(RuntimeError, match="1 blocks"):
        live.step()
    with pytest.raises(ValueError, match="snapshot's cache"):
        other = session(pipeline, make_config(pipeline, window=3))
        other.restore(live.snapshot())


def test_a_failed_step_says_how_to_go_on(pipeline, monkeypatch):
    """The cache has been given away by then; a snapshot continues as if nothing had happened."""
    live = session(pipeline)
    live.step()
    snapshot = live.snapshot()
    expected = live.step()
    live.restore(snapshot)

    def out_of_memory(*args, **options):
        generate_block(*args, **options)
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(block_maker, "block_program", lambda condition: out_of_memory)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as caught:
            live.step()
    assert "restore(snapshot)" in caught.value.__notes__[0]
    for call in (live.step, live.snapshot, live.finish):
        with pytest.raises(RuntimeError, match=r"earlier step.*restore\(snapshot\)"):
            call()
    live.restore(snapshot)
    again = live.step()
    np.testing.assert_array_equal(again.frames, expected.frames)
    np.testing.assert_array_equal(again.waveform, expected.waveform)


def test_pipeline_config_names_what_is_missing():
    metadata = synthetic.metadata("tiny", "2.0")
    with pytest.raises(ValueError, match="vocoder"):
        PipelineConfig.from_metadata({**metadata, "vocoder": None}, "2.0.0")
    channels = {"in_channels": 16, "out_channels": 16}
    other = {**metadata, "transformer": {**metadata["transformer"], **channels}}
    with pytest.raises(ValueError, match="different models"):
        PipelineConfig.from_metadata(other, "2.0.0")
    config = PipelineConfig.from_metadata(metadata, "2.0.0")
    with pytest.raises(ValueError, match="multiples of 32"):
        config.check_size(250, 384)


@pytest.mark.parametrize(
    "path, part",
    [
        ("transformer/video_out/bias", "latents"),
        ("video_vae/decoder/conv_out/bias", "pictures"),
        ("vocoder/conv_post/bias", "sound"),
    ],
)
@pytest.mark.parametrize("decode_mode", ["causal", "window"])
def test_what_is_not_finite_ends_the_stream_and_names_its_block(pipeline, path, part, decode_mode):
    """It would be black frames, and nobody would know."""
    flat = flatten_dict(pipeline.params, sep="/")
    broken = unflatten_dict(flat | {path: jnp.full_like(flat[path], np.nan)}, sep="/")
    live = session(dataclasses.replace(pipeline, params=broken), decode_mode=decode_mode)
    first = 1 if part == "pictures" and decode_mode == "window" else 0  # nothing is decoded before
    first = 1 if part == "sound" else first
    for _ in range(first):
        live.step()
    with pytest.raises(FloatingPointError, match=rf"^block {first} \(from .*\) has {part} that"):
        live.step()


def test_blocks_that_are_not_finite_are_counted_as_chunks_are(pipeline):
    live = session(pipeline)
    live._steering.given = live._steering.given.replace(hidden=3)
    finite = False, True, np.zeros((1, 1, 2), np.float32)
    for block, place in ((1, "the reference has latents"), (4, r"block 2 \(from 1.04 s on\) has")):
        with pytest.raises(FloatingPointError, match=f"^{place}"):
            live._check_finite(block, *finite)


def test_a_chunk_is_cut_at_the_end_of_the_clip():
    frames, waveform = np.zeros((1, 24, 2, 2, 3), np.uint8), np.zeros((1, 1000, 2), np.float32)
    chunk = Chunk(1, 25, 1000, frames, waveform, None)
    assert chunk.until(100, 5000).frames.shape[1] == 24
    cut = chunk.until(30, 1200)
    assert (cut.frames.shape[1], cut.waveform.shape[1]) == (5, 200)
    assert chunk.until(20, 900).frames.shape[1] == 0
