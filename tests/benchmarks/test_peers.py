"""What is timed beside diffusers computes what diffusers does."""

import numpy as np
import pytest

from benchmarks import page, peers


@pytest.mark.parametrize(
    "make", [peers.transformers, pytest.param(peers.decoders, marks=pytest.mark.slow)]
)
def test_both_agree_before_they_are_timed(make, tmp_path):
    ours, theirs = make(peers.SIZES["tiny"], tmp_path, "float32")
    found = peers.compare((ours, theirs), 3, "float32")
    assert 0 < found["ratio_least"] <= found["ratio"] <= found["ratio_most"]
    reference = theirs()
    assert all(x.std() > 0.05 for x in reference)
    off = [x + 0.01 * np.abs(x).max() for x in reference]
    with pytest.raises(ValueError, match="another result than diffusers'"):
        peers.compare((lambda: off, lambda: reference), 1, "float32")


def test_what_cannot_be_measured(capsys):
    assert peers.main(["--threads", "999"]) == 2
    assert "--threads 999: there are" in capsys.readouterr().err
    assert page.main(["--chromium", "/nowhere"]) == 2
    assert "there is no Chromium" in capsys.readouterr().err
