"""The metadata of the published checkpoints, as their safetensors headers carry it."""

import json
import pathlib

_FOLDER = pathlib.Path(__file__).parent / "metadata"


def published_config(version: str) -> dict:
    """The `config` object of LTX-2.0 ("2.0") or LTX-2.3 ("2.3"); the caller's own copy."""
    return json.loads((_FOLDER / f"ltx{version}.json").read_text())
