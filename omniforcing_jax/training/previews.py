"""Clips to look at: decoded latents as files, and what a student under training makes.

`ClipDecoder` turns latents into an MP4 with a picture beside it; `SampleHook` samples the same
prompts again and again while a student is trained.
"""

import functools
import os
import pathlib
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.io import checkpoints
from omniforcing_jax.pipeline import PipelineConfig, decode_clip
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.whole_clip import audio_attention_entropy
from omniforcing_jax.streaming.contact_sheet import write_clip
from omniforcing_jax.training.adapters import bind
from omniforcing_jax.training.batches import text_arrays
from omniforcing_jax.training.config.experiment import Experiment
from omniforcing_jax.training.config.fit import DECODERS
from omniforcing_jax.training.loop import Hook, Scalars
from omniforcing_jax.training.objectives.common import Frozen, checked_seed, sample_keys
from omniforcing_jax.training.state import TrainState
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.training.students.unrolled import UnrolledStudent
from omniforcing_jax.types import AVLatents

_ENTROPY_SIGMA = 0.5


def training_hooks(
    e: Experiment, stage: Any, frozen: Frozen, workdir: epath.Path
) -> Sequence[Hook]:
    """The hook that samples clips every `sample_every` steps; none if that is 0."""
    if not e.config.sample_every:
        return ()
    return (Hook(e.config.sample_every, SampleHook(e, stage, frozen, workdir / "samples")),)


def full_generator(e: Experiment, stage: Any) -> BidirectionalStudent | UnrolledStudent:
    """The student as it is sampled: the whole clip, all steps."""
    if e.config.stage == "stage1":
        return stage.generator
    model = stage.model if e.config.stage == "stage2" else stage.generator.model
    return UnrolledStudent(model, e.rollout, e.config.clip.blocks, e.config.clip.blocks)


class SampleHook:
    """Samples the same prompts from the same noise whenever it is called.

    Files: `FOLDER/STEP_PROMPT.mp4` and `.png`, the latter with waveform and spectrogram.
    """

    def __init__(self, e: Experiment, stage: Any, frozen: Frozen, folder: epath.Path):
        """Reads the first `sample_clips` prompts of the experiment's data."""
        self.experiment, self.stage, self.frozen, self.folder = e, stage, frozen, folder
        count = min(e.config.sample_clips, len(e.data))
        elements = [text_arrays(e.data[i], e.data.manifest) for i in range(count)]
        names = [n for n in elements[0] if "features" in n or n == "mask"]
        self.batch = {n: np.stack([element[n] for element in elements]) for n in names}
        self.generator = full_generator(e, stage)

    def __call__(self, step: int, state: TrainState) -> Scalars:
        """Samples, measures, decodes, and writes files; returns the measures.

        All processes sample; process 0 decodes and writes. If it cannot, it warns: a picture less
        is no reason to end a run.
        """
        network = state.generator
        params = network.params if network.ema is None else network.ema
        latents, scalars = self._sample(
            params, self.frozen, self.batch, checked_seed(self.experiment.config.seed)
        )
        scalars = {name: float(value) for name, value in jax.device_get(scalars).items()}
        latents = multihost_utils.process_allgather(latents, tiled=True)
        if jax.process_index() == 0:
            # a mesh of its own: on that of the run, the other processes would have to decode, too
            with jax.set_mesh(partitioning.make_mesh(devices=jax.local_devices()[:1])):
                try:
                    self._write(step, latents)
                except Exception:
                    warnings.warn(
                        f"no sample clips of step {step}, the run goes on:\n"
                        f"{traceback.format_exc()}",
                        stacklevel=2,
                    )
        return scalars

    @functools.cached_property
    def _sample(self):
        """Jitted (masters, frozen, text, seed) -> latents and scalars."""
        e, model = self.experiment, self.generator.model

        @jax.jit
        def sample(params, frozen: Frozen, batch, seed: jax.Array):
            weights = jax.tree.map(lambda p: p.astype(model.dtype), params)
            contexts = self.stage.text.contexts(frozen.connectors, batch)
            generator = bind(self.generator, frozen.teacher, e.config.adapters)
            rows = jnp.arange(batch["mask"].shape[0])
            keys = sample_keys(jax.random.key(seed), rows)
            latents = generator.generate(weights, contexts, keys)
            scalars = _statistics(latents)
            if e.config.stage != "stage1":
                scalars |= self._entropy(generator.model, weights, latents, contexts, keys)
            return latents, scalars

        return sample

    def _entropy(self, model, weights, latents: AVLatents, contexts, keys) -> dict[str, jax.Array]:
        """Entropy of the audio self-attention under the masks, on the noised sample."""
        clip, layout = self.generator.clip, self.experiment.layout
        model = model.clone(causal=clip.mask(layout))
        sigma = jnp.full(keys.shape, _ENTROPY_SIGMA)
        noise = draw_noise(keys, clip, model)
        noisy = jax.tree.map(lambda x, n: flow.add_noise(x, n, sigma), latents, noise)
        entropy = audio_attention_entropy(model, weights, noisy, sigma, contexts, clip)
        return {
            "sample/audio_entropy": jnp.mean(entropy),
            "sample/audio_entropy_lowest": jnp.min(jnp.mean(entropy, axis=1)),
        }

    def _write(self, step: int, latents: AVLatents) -> None:
        e, clip = self.experiment, self.generator.clip
        decoder = ClipDecoder(e.config.checkpoint, e.pipeline, clip, e.dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as local:  # the folder may be on object storage
            for i in range(latents.video.shape[0]):
                one = jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + 1]), latents)
                decoder.write(pathlib.Path(local) / f"{step:06d}_{i}.mp4", one)
            for file in pathlib.Path(local).iterdir():
                epath.Path(file).copy(self.folder / file.name, overwrite=True)


def _statistics(latents: AVLatents) -> dict[str, jax.Array]:
    """Mean and standard deviation of the latents; those of real clips are near 0 and 1."""
    return {
        "sample/video_mean": jnp.mean(latents.video),
        "sample/video_std": jnp.std(latents.video),
        "sample/audio_mean": jnp.mean(latents.audio),
        "sample/audio_std": jnp.std(latents.audio),
    }


class ClipDecoder:
    """Decodes latents of one size into files; reads the decoders when the first clip comes."""

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        config: PipelineConfig,
        clip: ClipGeometry,
        dtype: jnp.dtype,
    ):
        """
        Args:
          checkpoint: a converted checkpoint, for its decoders.
          config: of the checkpoint.
          clip: size and frame rate of the latents.
          dtype: in which the VAEs compute.
        """
        self._checkpoint, self._config, self._clip, self._dtype = checkpoint, config, clip, dtype

    def write(self, path: pathlib.Path, latents: AVLatents) -> None:
        """Writes a clip [1, T, C] as `write_clip` does."""
        clip, config = self._clip, self._config
        size = (clip.video_frames, clip.height, clip.width)
        frames, waveform = decode_clip(config, self._params, latents, size, self._dtype)
        write_clip(path, frames, waveform, clip.frame_rate, config.vocoder.sample_rate)

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return {
            name: checkpoints.load_params(
                self._checkpoint,
                name,
                dtype=jnp.float32 if name == "vocoder" else self._dtype,
                without="encoder",
            )
            for name in DECODERS
        }
