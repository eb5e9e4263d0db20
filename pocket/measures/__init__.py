"""Measures of clips of the pocket world (`pocket.world.physics`); no weights are needed.

`tracking` says what is seen and `onsets` what is heard, `synchrony` pairs the two, `observation`
holds all of it, `report` turns it into numbers, and `frechet` compares sets of clips. Lengths are
heights of the picture, as in the world itself, so that clips of any resolution can be measured.
"""
