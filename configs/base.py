"""What the configs of the three stages have in common: every setting, at the paper's values.

A config file's `get_config(variant)` starts from `training(stage)` and changes what differs.
Settings are changed on the command line by `--config.name=value`; a name that does not exist is an
error.
"""

import ml_collections


def training(stage: str) -> ml_collections.ConfigDict:
    """All settings of a stage ("stage1", "stage2" or "stage3")."""
    c = ml_collections.ConfigDict()
    c.stage = stage
    c.seed = 0

    # What is trained on what. `checkpoint` is a converted LTX-2: teacher, start of the critic,
    # connectors and decoders. `generator` is where the student starts: a run of another stage, a
    # converted checkpoint, or "" for `checkpoint`; of a run, the average ("ema") or the "params".
    c.checkpoint = "checkpoints/ltx2"
    c.generator = ""
    c.generator_weights = "ema"
    c.data = "data/prompts"

    # The clip, in pixels and blocks: six prefix blocks at 24 frames per second are 121 frames.
    c.clip = ml_collections.ConfigDict(
        {"height": 512, "width": 768, "layout": "prefix", "blocks": 6, "frame_rate": 24.0}
    )
    # The student: noise levels, audio sink tokens and the other stabilisers of the paper's Table 3,
    # and how it will be streamed. Stage I has no use for all but the first.
    c.student = ml_collections.ConfigDict(
        {
            "timesteps": (1000.0, 909.0, 725.0, 421.0),
            "num_sinks": 0 if stage == "stage1" else 16,
            "sink_rope": "identity",  # or "incremental"
            "extra_qk_norm": False,
            "tanh_gated_attention": False,
            "window": 4,  # a stream then stays at the positions of six trained blocks
            "anchors": 0,
            "positions": "relative",
            "context_noise": 0.0,
        }
    )

    # Batch and length.
    c.batch_size = 32
    c.microbatches = 1
    c.num_steps = {"stage1": 2000, "stage2": 3000, "stage3": 2000}[stage]

    # Optimizers (AdamW on float32 masters). A schedule counts the updates of its own network.
    optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 2e-5,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "schedule": "constant",
            "warmup_steps": 0,
            "decay_steps": 0,
            "end_scale": 0.0,
            "audio_learning_rate_scale": 1.0,
            "train": "all",  # or "audio"
        }
    )
    c.generator_optimizer = optimizer
    c.ema = ml_collections.ConfigDict({"decay": 0.99, "start_step": 200})
    c.loss = ml_collections.ConfigDict({"video": 1.0, "audio": 1.0})  # lambda_v, lambda_a

    if stage == "stage2":
        c.regression = ml_collections.ConfigDict(
            {
                "objective": "velocity",  # Eq. 6; or "x0"; or "flow": an autoregressive teacher
                "level_per_block": True,
                "include_clean": True,
                "clean_history": 0.0,
            }
        )
    else:
        c.critic_optimizer = ml_collections.ConfigDict(optimizer.to_dict())
        c.critic_updates = 5  # per update of the generator
        # Probabilities of the steps at which the student exits, one per timestep; () is uniform.
        # Uniform matches the mixture of all exits, (0, ..., 0, 1) the clip after all steps.
        c.exit_weights = ()
        c.score = ml_collections.ConfigDict(
            {
                "video_cfg": (3.0, 3.0),  # the teacher's guidance: a range to draw from
                "audio_cfg": (5.0, 5.0),
                "stg": 0.0,  # its spatio-temporal guidance, and the blocks this perturbs
                "stg_blocks": (),
                "min_timestep": 20,
                "max_timestep": 980,
                "context": "bidirectional",  # or "block_causal": what the student sees
            }
        )
    if stage == "stage3":
        c.rollout_blocks = 6  # more than clip.blocks: only the last clip.blocks are scored
        c.detach_history = True

    # Machines. fsdp = -1 takes the devices that the other axes leave.
    c.mesh = ml_collections.ConfigDict({"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1})
    c.compute = ml_collections.ConfigDict(
        {
            "dtype": "bfloat16",
            "remat": "full",  # "none", "full", or a policy of jax.checkpoint_policies
            "attention": "auto",
            "gather_weights": False,
            # teacher and critic on half of the devices, the student on the others, `mesh` being
            # the shape of either half
            "separate_scores": False,
        }
    )

    # Records, checkpoints, sample clips (`sample_every` 0: none).
    c.log_every = 10
    c.checkpoint_every = 100
    c.keep_last = 3
    c.keep_every = 500
    c.tensorboard = True
    c.sample_every = 100
    c.sample_clips = 2
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
