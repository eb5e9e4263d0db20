"""The metadata of the published checkpoints, as their safetensors headers carry it."""

import json
import pathlib

_FOLDER = pathlib.Path(__file__).parent / "metadata"


def published_config(version: str) -> dict:
    """The `config` object of LTX-2 "2.0", "2.3" or "2.5"; the caller's own copy."""
    if version == "2.5":
        config = published_config("2.3")
        config["transformer"] |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
        return config
    return json.loads((_FOLDER / f"ltx{version}.json").read_text())
