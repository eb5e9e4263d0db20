"""What the configs of the three stages have in common.

A config file's `get_config(variant)` starts from `training(stage)`, which has every setting at the
paper's value, and changes what differs; omniforcing_jax/training/config/settings.py says what they
mean. Settings are changed on the command line by `--config.name=value`; a name that does not exist
is an error.
"""

import ml_collections

from omniforcing_jax.training.config import parsing, settings

# Variants that train adapters instead of all weights, and their ranks.
ADAPTER_RANKS = {"19b-lora": 64, "tiny-lora": 4, "pocket-lora": 16}


def training(stage: str) -> ml_collections.ConfigDict:
    """All settings of a stage ("stage1", "stage2" or "stage3"), at their defaults."""
    return ml_collections.ConfigDict(parsing.to_dict(settings.STAGES[stage]()))


def adapters(c: ml_collections.ConfigDict, rank: int) -> ml_collections.ConfigDict:
    """Low-rank adapters over one frozen base, in place of all weights of two networks.

    B starts at zero, so an update moves W by the learning rate times A at first: five times the
    rate of whole weights, and no decay towards the base.
    """
    c.adapters.ranks = (rank,)
    for name in ("generator_optimizer", "critic_optimizer"):
        if name in c:
            c[name].update({"learning_rate": 5 * c[name].learning_rate, "weight_decay": 0.0})
    return c


def tiny(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A model of random weights on a laptop: the same code in seconds a step."""
    c.checkpoint = "outputs/tiny/ltx2"
    c.clip.update({"height": 64, "width": 64, "blocks": 3})
    c.student.window = 1
    c.student.timesteps = (1000.0, 725.0)
    c.batch_size = 4
    c.num_steps = 20
    c.log_every = 1
    c.checkpoint_every = 10
    c.keep_every = 10
    c.sample_every = 10
    c.sample_clips = 1
    c.ema.start_step = 5
    c.compute.update({"dtype": "float32", "remat": "none"})
    if "rollout_blocks" in c:
        c.rollout_blocks = 3
    if c.student.num_sinks:
        c.student.num_sinks = 4
    return c


def pocket(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The pocket model in the world of balls (`pocket/`): minutes a stage on two cores.

    A few hundred steps must do, so the learning rates are ten times those of the large model, the
    critic has fewer updates to follow in, and the average forgets sooner.
    """
    c.checkpoint = "outputs/pocket/ltx2"
    c.data = "outputs/pocket/prompts"
    c.clip.update({"height": 48, "width": 64, "blocks": 3})
    c.student.window = 1  # of three blocks, none sees more than two others
    c.batch_size = 8
    c.generator_optimizer.update({"learning_rate": 2e-4, "weight_decay": 0.0})
    if "critic_optimizer" in c:
        c.critic_optimizer.update({"learning_rate": 4e-4, "weight_decay": 0.0})
        c.critic_updates = 3
        c.score.video_cfg = c.score.audio_cfg = (1.5, 1.5)
    if "rollout_blocks" in c:
        c.rollout_blocks = 3
    c.log_every = 10
    c.checkpoint_every = 50
    c.keep_every = None
    c.tensorboard = False
    c.sample_every = 100
    c.sample_clips = 2
    c.ema.update({"decay": 0.95, "start_step": 50})
    c.compute.update({"dtype": "float32", "remat": "none"})
    return c
