"""Stage I: distribution matching distillation of the bidirectional model to a few steps.

Variants (`python -m launch.stage1 --config=configs/stage1.py:VARIANT --workdir=RUN`; with --plan it
prints parameters, memory and arithmetic, and exits):

  19b     The paper's: batch 32, 2e-5, 2,000 steps (400 of them update the generator), the teacher
          guided by 3 (video) and 5 (audio).

            python -m launch.stage1 --config=configs/stage1.py:19b --workdir=runs/stage1 \\
                --config.checkpoint=checkpoints/ltx2 --config.data=data/prompts

          Expect a generator loss that stays of the order of 0.1 to 1 (it is half the mean square of
          a normalised direction and does not go to zero), and a critic loss that falls quickly at
          first. docs/training.md shows what curves look like.
  19b-v2  The schedule of the public code: three steps at 1000, 757, 522, gradients clipped at 3.
  tiny    Random weights on a laptop, about a minute. `make tiny` makes in outputs/tiny what the
          stages need (weights, prompts, trajectories), and runs one after the other; this one by

            python -m launch.stage1 --config=configs/stage1.py:tiny --workdir=outputs/tiny/stage1

          Expect finite losses and a sample clip of noise: the weights are random.
  pocket  The pocket model, from its teacher (pocket/pretrain_config.py) on two cores:

            python -m launch.stage1 --config=configs/stage1.py:pocket \\
                --workdir=outputs/pocket/stage1
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
        return c
    c = base.training("stage1")
    if variant == "19b-v2":
        c.student.timesteps = (1000.0, 757.0, 522.0)
        c.generator_optimizer.clip_norm = c.critic_optimizer.clip_norm = 3.0
        c.clip.layout = "merged"
        c.clip.blocks = 5
    elif variant == "tiny":
        c = base.tiny(c)
        c.data = "outputs/tiny/prompts"
    elif variant == "pocket":
        c = base.pocket(c)
        c.num_steps = 300
    elif variant != "19b":
        raise ValueError(
            f"unknown variant {variant!r}; there are 19b, 19b-v2, tiny, pocket"
            f" and {', '.join(base.ADAPTER_RANKS)}"
        )
    return c
