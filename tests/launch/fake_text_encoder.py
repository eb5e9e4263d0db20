"""A text encoder that is arithmetic on the token ids, for tests of what surrounds it.

    python -m tests.launch.fake_text_encoder STEPS [COORDINATOR INDEX COUNT] -- OPTIONS

runs `launch.encode_prompts` with it; after so many steps it stands still, to be killed midway.
"""

import json
import pathlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from launch import encode_prompts
from omniforcing_jax.distributed import multihost
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.text.tokenizer import load_tokenizer

STEPS = float("inf")


class FakeTextEncoder:
    """Has what `launch.encode_prompts` uses of `TextEncoder`.

    A token's features depend on it and on the tokens in front of it. Padding is NaN, so that
    storing any of it fails.
    """

    def __init__(self, tokenizer, dims, shared, length):
        self.tokenizer = tokenizer
        self.length = length
        self.shared_features = shared
        self.shapes = []  # of the batches it was given
        self._dims = dims

    @classmethod
    def load(cls, gemma, checkpoint, *, dtype, quantize, length, mesh, verify=True):
        metadata = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())
        config = ConnectorConfig.from_metadata(metadata["config"]["transformer"])
        return cls(
            load_tokenizer(gemma),
            (config.video_dim, config.audio_dim),
            not config.separate_projections,
            length,
        )

    def features(self, token_ids, mask):
        if len(self.shapes) >= STEPS:
            threading.Event().wait()  # for a signal
        self.shapes.append(token_ids.shape)
        total = np.cumsum(np.where(mask, token_ids + 1, 0), axis=1)
        arrays = [
            np.where(mask, np.sin(total * 0.37), np.nan)[..., None] * np.linspace(0.1, 1, dim)
            for dim in self._dims
        ]
        video, audio = (jnp.asarray(x, jnp.float32) for x in arrays)
        return (video, video) if self.shared_features else (video, audio)


if __name__ == "__main__":
    split = sys.argv.index("--")
    STEPS, *process = sys.argv[1:split]
    STEPS = float(STEPS)
    if process:
        address, index, count = process
        jax.distributed.initialize(address, int(count), int(index), initialization_timeout=240)
    encode_prompts.TextEncoder = FakeTextEncoder
    multihost.end(encode_prompts.main(sys.argv[split + 1 :]))
