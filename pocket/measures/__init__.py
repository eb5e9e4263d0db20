"""Measures of clips of the pocket world (`pocket.world.physics`); no weights are needed.

`tracking` says what is seen and `onsets` what is heard, `synchrony` pairs the two, `observation`
holds all of it, `scalars` turns it into numbers, and `frechet` compares sets of clips. Lengths are
heights of the picture, as in the world itself, so that clips of any resolution can be measured.
"""

import importlib.util

_MISSING = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
if _MISSING:  # programs that measure end here, without a traceback
    raise SystemExit(f"error: {' and '.join(_MISSING)} missing: pip install -e '.[pocket]'")
