"""Shared fixtures: the golden files in tests/golden (see its README) and their weights."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder with the reference weights (`*.safetensors`) and outputs (`*.npz`)."""
    return GOLDEN


@pytest.fixture(scope="session")
def ltx20():
    """Inputs and outputs of the LTX-2.0 reference at tiny size."""
    return np.load(GOLDEN / "ltx2_tiny_expected.npz")


@pytest.fixture(scope="session")
def ltx23():
    """Inputs and outputs of the LTX-2.3 reference at tiny size."""
    return np.load(GOLDEN / "ltx23_tiny_expected.npz")
