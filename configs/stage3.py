"""Stage III: joint self-forcing. The student learns on what it generates itself, block by block.

Variants (`python -m launch.stage3 --config=configs/stage3.py:VARIANT --workdir=RUN`; with --plan it
prints parameters, memory and arithmetic, and exits):

  19b     The paper's: batch 32, 2e-5, 2,000 steps (400 of them update the generator), scores over
          the whole clip by the bidirectional teacher, guided by 3 (video) and 5 (audio).

            python -m launch.stage3 --config=configs/stage3.py:19b --workdir=runs/stage3 \\
                --config.generator=runs/stage2 --config.data=data/prompts

          Expect curves like those of stage I; the generator's loss is larger at first, where errors
          have piled up along the rollout.
  19b-v2  The public code's recipe, corrected: merged blocks, no sinks, betas (0, 0.999).
  19b-ar  What rivals found decisive: teacher and critic see each block with the clean past that the
          student saw, guidance drawn from 1 to 3.5, the audio stream learning three times as fast.
  tiny    Random weights on a laptop, about two minutes after stage II:

            python -m launch.stage3 --config=configs/stage3.py:tiny --workdir=outputs/tiny/stage3

  pocket  The pocket model after stage II:

            python -m launch.stage3 --config=configs/stage3.py:pocket \\
                --workdir=outputs/pocket/stage3
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
    c = base.training("stage3")
    if variant == "19b-v2":
        c.clip.layout = "merged"
        c.clip.blocks = c.rollout_blocks = 5
        c.student.window = 3
        c.student.num_sinks = 0
        c.generator_optimizer.beta1 = c.critic_optimizer.beta1 = 0.0
    elif variant == "19b-ar":
        c.score.context = "block_causal"
        c.score.video_cfg = c.score.audio_cfg = (1.0, 3.5)
        c.generator_optimizer.audio_learning_rate_scale = 3.0
    elif variant == "tiny":
        c = base.tiny(c)
        c.data = "outputs/tiny/prompts"
        c.generator = "outputs/tiny/stage2"
    elif variant == "pocket":
        c = base.pocket(c)
        c.generator = "outputs/pocket/stage2"
        c.num_steps = 240
    elif variant != "19b":
        raise ValueError(
            f"unknown variant {variant!r}; there are 19b, 19b-v2, 19b-ar, tiny, pocket"
            f" and {', '.join(base.ADAPTER_RANKS)}"
        )
    return c
