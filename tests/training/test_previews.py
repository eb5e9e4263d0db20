"""Sample clips during training: what may fail without ending the run."""

import types

import jax.numpy as jnp
import pytest

from omniforcing_jax.training.previews import Previews
from omniforcing_jax.types import AVLatents

LATENTS = AVLatents(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)))


class Stub(Previews):
    """Samples zeros, and fails to write them."""

    def __init__(self, error: BaseException):
        super().__init__(
            types.SimpleNamespace(config=types.SimpleNamespace(seed=0)), None, None, None
        )
        self.error, self.batch = error, {}
        self._sample = lambda *_: (LATENTS, {"sample/video_mean": jnp.float32(0.5)})

    def __post_init__(self):
        pass

    def _write(self, step, latents):
        raise self.error


STATE = types.SimpleNamespace(generator=types.SimpleNamespace(params={}, ema=None))


def test_a_clip_that_cannot_be_written_does_not_end_the_run():
    with pytest.warns(UserWarning, match="no sample clips of step 100") as caught:
        scalars = Stub(OSError("the disk is full"))(100, STATE)
    assert scalars == {"sample/video_mean": 0.5}
    assert "the disk is full" in str(caught[0].message)
    assert "in _write" in str(caught[0].message), "where it happened"


def test_interrupts_pass():
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            Stub(error())(100, STATE)
