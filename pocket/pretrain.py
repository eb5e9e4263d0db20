"""Pre-trains a part of the pocket model; see pocket/pretrain_config.py for the parts.

    python -m pocket.pretrain --config=pocket/pretrain_config.py:video_vae

Started again, a run goes on where it was; SIGTERM saves it first. A finished part is not trained
again. Exit statuses: 0 finished, 1 failed, 2 refused, 130 interrupted, 143 stopped by SIGTERM.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging
from ml_collections import config_flags
from rich.console import Console

from checkpoint_converters import reading, synthetic
from checkpoint_converters.export import write_components
from launch import options
from omniforcing_jax import programs
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.io import outputs
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.text.gemma import TextTower
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling.guidance import NO_GUIDANCE
from omniforcing_jax.sampling.trained import ENTRY, TrainedSettings
from omniforcing_jax.text.encoder_files import load_gemma_config
from omniforcing_jax.text.text_encoder import load_text_tower
from omniforcing_jax.text.tokenizer import load_tokenizer
from omniforcing_jax.training.loop import RUN_FILES, Hook, LoopConfig, Outcome, train
from omniforcing_jax.training.mixture import ConditionMixture, GivenInput
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import create_network, create_state
from omniforcing_jax.training.training_checkpoints import load_generator
from pocket import pretrain_config
from pocket.pretraining import autoencoders
from pocket.pretraining.autoencoders import ErrorLoss, LatentNoise
from pocket.pretraining.batches import DrawnBatches, WorldWindows
from pocket.pretraining.latents import WorldEncoder, draw_row, load_latents, write_latents
from pocket.pretraining.step import Loss, Pretraining
from pocket.pretraining.teacher import HeldOut, TeacherLoss, init_teacher
from pocket.world.physics import WorldConfig

VERSION = "2.0"
STATISTICS_BATCHES = 24  # whose latents the channels' means and deviations are taken of

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file and part, such as pocket/pretrain_config.py:video_vae."
)
_RESUME_CHANGED = flags.DEFINE_bool(
    "allow_config_change", False, "Resume although the config is not that of the run."
)
_EXPORT = flags.DEFINE_bool(
    "export", False, "Write the part's file from its run as it stands, and train no further."
)


@dataclasses.dataclass(frozen=True)
class Part:
    """What is to be trained."""

    loss: Loss
    init: Callable[[], Any]  # -> the parameters at the start
    draw: Callable  # see `DrawnBatches`
    components: Callable[[Any], dict[str, Any]]  # parameters -> {component: tree} when finished
    metadata: dict[str, Any]  # of the components: their `config`
    frozen: Any = None  # parameters that the loss reads
    hooks: tuple[Hook, ...] = ()  # of the training loop


def part_file(folder: str, part: str) -> pathlib.Path:
    """Where a finished part is."""
    return pathlib.Path(folder) / f"{part}.safetensors"


def load_part(folder: str, part: str, component: str) -> Any:
    """A component of a finished part.

    Raises:
      ValueError: the part is not there.
    """
    file = part_file(folder, part)
    if not file.is_file():
        raise ValueError(
            f"{file} is not there; python -m pocket.pretrain "
            f"--config=pocket/pretrain_config.py:{part} --config.folder={folder} makes it"
        )
    return jax.tree.map(jnp.asarray, reading.load_component(file, component))


def make_part(c) -> Part:
    """What the config describes.

    Raises:
      ValueError: a setting that does not fit, or a part that this one needs is missing.
    """
    metadata = model_metadata(c)
    pipeline = PipelineConfig.from_metadata(metadata, synthetic.VERSIONS[VERSION])
    windows = WorldWindows(WorldConfig(**c.world))
    build = {
        "video_vae": _video_vae,
        "audio_vae": _audio_vae,
        "vocoder": _vocoder,
        "causal_decoder": _causal_decoder,
        "teacher": _teacher,
    }[c.part]
    return build(c, pipeline, windows, metadata)


def model_metadata(c) -> dict:
    """The `config` object of the checkpoint that the part is of."""
    if c.part != "teacher":
        return synthetic.metadata(c.size, VERSION)
    m = c.model
    dims = m.video_head_dim, m.audio_head_dim
    return synthetic.metadata(c.size, VERSION, m.layers, heads=m.heads, dims=dims)


def _autoencoder(c, loss, init: Callable, draw: Callable, metadata: dict[str, Any]) -> Part:
    """Of the VAEs, whose files have statistics of the latents of batches not trained on."""

    def components(params):
        batches = DrawnBatches(draw, c.batch_size, c.seed + 1)
        encode = jax.jit(lambda batch: loss.encode(params, batch))
        latents = (encode(next(batches)) for _ in range(STATISTICS_BATCHES))
        statistics = autoencoders.channel_statistics(latents)
        return {c.part: params | {"per_channel_statistics": statistics}}

    return Part(loss, lambda: init(loss.config, jax.random.key(c.seed)), draw, components, metadata)


def _video_vae(c, pipeline: PipelineConfig, windows: WorldWindows, metadata) -> Part:
    config = pipeline.video_vae
    pipeline.check_size(c.world.height, c.world.width)
    config.latent_frames(c.frames)
    loss = autoencoders.VideoLoss(config, LatentNoise(**c.latents), ErrorLoss(**c.error))
    return _autoencoder(c, loss, autoencoders.init_video_vae, windows.video(c.frames), metadata)


def _audio_vae(c, pipeline: PipelineConfig, windows: WorldWindows, metadata) -> Part:
    config = pipeline.audio_vae
    loss = autoencoders.AudioVAELoss(config, LatentNoise(**c.latents), ErrorLoss(**c.error))
    draw = windows.sound(c.samples, config.mel.hop)
    return _autoencoder(c, loss, autoencoders.init_audio_vae, draw, metadata)


def _causal_decoder(c, pipeline: PipelineConfig, windows: WorldWindows, metadata) -> Part:
    config = pipeline.video_vae
    config.latent_frames(c.frames)
    trained = load_part(c.folder, "video_vae", "video_vae")
    latents, error = LatentNoise(**c.latents), ErrorLoss(**c.error)
    return Part(
        loss=autoencoders.VideoLoss(config, latents, error, causal=True),
        init=lambda: {"decoder": trained["decoder"]},
        frozen={"encoder": trained["encoder"]},
        draw=windows.video(c.frames),
        components=lambda params: {"video_vae": trained | params},
        metadata=metadata | {"vae": metadata["vae"] | {"causal_decoder": True}},
    )


def _vocoder(c, pipeline: PipelineConfig, windows: WorldWindows, metadata) -> Part:
    config = pipeline.vocoder
    if c.samples % config.hop:
        raise ValueError(f"samples must be a multiple of the hop {config.hop}, not {c.samples}")
    return Part(
        loss=autoencoders.VocoderLoss(config, pipeline.audio_vae, c.loss.waveform),
        init=lambda: autoencoders.init_vocoder(config, jax.random.key(c.seed)),
        frozen=load_part(c.folder, "audio_vae", "audio_vae"),
        draw=windows.sound(c.samples, config.hop),
        components=lambda params: {"vocoder": params},
        metadata=metadata,
    )


def _teacher(c, pipeline: PipelineConfig, windows: WorldWindows, metadata) -> Part:
    size = pipeline.check_size(c.world.height, c.world.width)
    layout = BlockLayout.from_name(c.clip.layout, frame_rate=c.clip.frame_rate)
    clip = ClipGeometry.from_blocks(layout, c.clip.blocks, *size)
    gemma = pathlib.Path(c.folder) / "gemma"
    tower_config, tokenizer = load_gemma_config(gemma), load_tokenizer(gemma)
    loss = TeacherLoss(
        model=Transformer(pipeline.transformer, unroll=c.unroll),
        connectors=ConnectorConfig.from_metadata(metadata["transformer"]),
        tower=TextTower(tower_config, jnp.float32),
        given=GivenInput(ConditionMixture(**c.conditions), clip, layout),
        weights=LossWeights(c.loss.video, c.loss.audio),
        shift=c.loss.shift,
        uniform=c.loss.uniform,
        caption_dropout=c.loss.caption_dropout,
    )
    if c.text_length % loss.connectors.num_registers:
        raise ValueError(
            f"text_length must be a multiple of the {loss.connectors.num_registers} registers, "
            f"not {c.text_length}"
        )
    encoded = functools.partial(_latents, c, pipeline, windows.world, clip, tokenizer)
    latents = encoded("train", c.num_clips)
    frozen = {"tower": load_text_tower(gemma, tower_config, dtype=jnp.float32)}
    held_out = HeldOut(loss, frozen, encoded("validation", c.heldout.clips))
    trained = TrainedSettings(
        stage="base",
        text_length=c.text_length,
        frame_rate=c.clip.frame_rate,
        height=c.world.height,
        width=c.world.width,
        frames=layout.pixel_frames(c.clip.blocks),
        guidance=NO_GUIDANCE.changed(cfg_video=c.guidance, cfg_audio=c.guidance),
    )

    def init():
        params = init_teacher(loss, tower_config.num_states, jax.random.key(c.seed))
        return load_generator(c.init, params, which="ema") if c.init else params

    return Part(
        loss=loss,
        init=init,
        frozen=frozen,
        hooks=(Hook(c.heldout.every, lambda step, state: held_out(state.generator.ema)),),
        draw=functools.partial(draw_row, latents),
        components=lambda params: params,
        metadata=metadata | {ENTRY: trained.to_json()},
    )


def _latents(
    c, pipeline: PipelineConfig, world: WorldConfig, clip: ClipGeometry, tokenizer, split, num_clips
):
    """The first encoded clips of a split, which are made if they are not there."""
    vaes = ("video_vae", "audio_vae")
    parts = [load_part(c.folder, part, part) for part in vaes]
    digest = hashlib.sha256(b"".join(part_file(c.folder, part).read_bytes() for part in vaes))
    suffix = "" if split == "train" else f"_{split}"
    folder = pathlib.Path(c.folder) / f"latents_{c.clip.blocks}{suffix}"
    encoder = WorldEncoder(pipeline, world, clip, *parts)
    write_latents(folder, encoder, num_clips, digest.hexdigest()[:16], split=split)
    return load_latents(folder, num_clips, tokenizer, world, c.text_length, split)


def optimizer_config(c) -> OptimizerConfig:
    """AdamW with a cosine that ends with the run."""
    decay_steps = max(c.num_steps - c.optimizer.warmup_steps, 1)
    return OptimizerConfig(**c.optimizer, schedule="cosine", decay_steps=decay_steps)


def train_part(c, part: Part, *, allow_config_change: bool = False) -> Outcome:
    """Trains, and writes the part's file once it is finished."""
    optimizer = make_optimizer(optimizer_config(c))
    ema = EMAConfig(**c.ema)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), part.init())
    # what a step gives back has a device of its own: were it otherwise before the first one, the
    # second would be compiled again
    params = jax.device_put(params, jax.devices()[0])
    settings = {name: c[name] for name in ("num_steps", "log_every", "checkpoint_every")}
    outcome = train(
        Pretraining(part.loss, optimizer, ema, c.seed),
        create_state(create_network(params, optimizer, ema=True)),
        part.frozen,
        DrawnBatches(part.draw, c.batch_size, c.seed),
        LoopConfig(
            **settings,
            keep_last=1,
            tensorboard=c.tensorboard,
            allow_config_change=allow_config_change,
        ),
        pathlib.Path(c.folder) / c.name,
        run_config=json.loads(c.to_json()),
        hooks=part.hooks,
    )
    if outcome.reason == "finished":
        write_part(c, part, outcome.state.generator.ema)
    return outcome


def write_part(c, part: Part, params: Any) -> None:
    """Writes the part's file."""
    version = synthetic.VERSIONS[VERSION]
    write_components(part_file(c.folder, c.name), part.components(params), part.metadata, version)


def run(c, *, allow_config_change: bool = False, export: bool = False) -> int:
    """Trains a part unless it is finished, or writes what it is so far; the exit status."""
    pretrain_config.check(c)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    file = part_file(c.folder, c.name)
    if file.is_file():
        console.print(f"{file} is there already; delete it to train further", markup=False)
        return 0
    folder = pathlib.Path(c.folder) / c.name
    outputs.check_run(folder, ("part", c.part), RUN_FILES, option="folder")
    part = make_part(c)
    optimizer_config(c)
    with programs.at_work():
        if export:
            write_part(c, part, load_generator(folder, part.init(), which="ema"))
        else:
            outcome = train_part(c, part, allow_config_change=allow_config_change)
            if outcome.reason != "finished":
                return 130 if outcome.reason == "stopped by SIGINT" else 143
    console.print(f"{file}", markup=False)
    return 0


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options.parse_flags(argv)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells dozens of lines about every save
    changed, export = _RESUME_CHANGED.value, _EXPORT.value
    return run(_CONFIG.value, allow_config_change=changed, export=export)


if __name__ == "__main__":
    sys.exit(main())
