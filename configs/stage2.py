"""Stage II: the student meets the block-causal masks, by regression on ODE trajectories.

The trajectories come from `python -m launch.ode_pairs`; see its help.

Variants (`python -m launch.stage2 --config=configs/stage2.py:VARIANT --workdir=RUN`; with --plan it
prints parameters, memory and arithmetic, and exits):

  19b       The paper's: velocities of the stage-I student (Eq. 6), 16 sink tokens with identity
            RoPE, 3,000 steps.

              python -m launch.stage2 --config=configs/stage2.py:19b --workdir=runs/stage2 \\
                  --config.generator=runs/stage1 --config.data=data/ode_pairs

            Expect a loss that falls fast for some hundred steps and then slowly, and gradient norms
            of the audio stream that stay near those of the video stream. The collapse of the
            paper's section 3.3 would show as spikes there, and as an entropy of the audio attention
            that falls towards 0.
  19b-v2    The public code's recipe, corrected: merged blocks, no sinks, x0 of LTX-2's guided
            trajectories, learning rate 2e-4; levels by block for the audio as well, and float32
            masters.
  19b-flow  An autoregressive teacher: block-causal flow matching on clean clips, a tenth of the
            steps with clean history. Its trajectories (`launch.ode_pairs --autoregressive`) can
            take the place of the bidirectional ones.
  tiny      Random weights on a laptop, about a minute after stage I (see configs/stage1.py):

              python -m launch.stage2 --config=configs/stage2.py:tiny --workdir=outputs/tiny/stage2

            Expect the loss to fall: the student starts as the model that made the trajectories.
  pocket    The pocket model after stage I:

              python -m launch.stage2 --config=configs/stage2.py:pocket \\
                  --workdir=outputs/pocket/stage2
  19b-lora, tiny-lora, pocket-lora
            The same with low-rank adapters of generator and critic over one frozen base, which is
            the teacher (docs/training.md, "Adapters").
"""

import ml_collections

from configs import base


def get_config(variant: str = "19b") -> ml_collections.ConfigDict:
    """The config of a variant; see the module's docstring."""
    if variant in base.ADAPTER_RANKS:
        c = base.adapters(get_config(variant.removesuffix("-lora")), base.ADAPTER_RANKS[variant])
        c.generator = c.generator and f"{c.generator}-lora"
        return c
    c = base.training("stage2")
    c.data = "data/ode_pairs"
    if variant == "19b-v2":
        c.clip.layout = "merged"
        c.clip.blocks = 5
        c.student.window = 3
        c.student.num_sinks = 0
        c.regression.objective = "x0"
        c.generator_optimizer.learning_rate = 2e-4
        c.generator_optimizer.weight_decay = 0.0
    elif variant == "19b-flow":
        c.regression.objective = "flow"
        c.regression.clean_history = 0.1
        c.generator_optimizer.learning_rate = 1e-4
        c.num_steps = 6000
    elif variant == "tiny":
        c = base.tiny(c)
        c.data = "outputs/tiny/ode_pairs"
        c.generator = "outputs/tiny/stage1"
        c.generator_optimizer.learning_rate = 1e-3
    elif variant == "pocket":
        c = base.pocket(c)
        c.data = "outputs/pocket/ode_pairs"
        c.generator = "outputs/pocket/stage1"
        c.generator_optimizer.learning_rate = 5e-4
        c.num_steps = 300
    elif variant != "19b":
        raise ValueError(
            f"unknown variant {variant!r}; there are 19b, 19b-v2, 19b-flow, tiny, pocket"
            f" and {', '.join(base.ADAPTER_RANKS)}"
        )
    return c
