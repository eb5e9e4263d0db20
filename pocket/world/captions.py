"""What is seen and heard in the pocket world, in varied words, and back from words to a scene.

Every caption names number, colours and sizes of the balls, and how high their tones are. Colours
have one name each; everything else has synonyms. `VOCABULARY` holds all words there are.
"""

import re

import numpy as np

from pocket.world.physics import COLOURS, MAX_BALLS, SIZES, Ball, Scene, check_scene

SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "average"),
    "large": ("large", "big", "huge"),
}
# Height of the tone, by colour in the order of `COLOURS`.
REGISTER_WORDS = (*[("low", "deep")] * 2, *[("middle",)] * 2, *[("high", "bright")] * 2)
COUNT_WORDS = ("one", "two", "three")
NOUNS = ("ball", "sphere")
MOTIONS = ("bounce", "jump", "hop")
FALLS = ("fall", "drop")
HITS = ("hit", "impact", "bounce", "knock")
RINGS = ("rings", "sounds", "plays")
TONES = ("tone", "bell", "note", "chime")
PLACES = (
    *("on the floor", "off the floor and the walls", "in a dark room", "between the walls"),
    *("in an empty room", "on the ground"),
)
GLUE = (
    *("a", "an", "and", "are", "as", "at", "each", "every", "hear", "heard", "is", "one", "ring"),
    *("see", "that", "the", "there", "we", "while", "with", "you"),
)


def _vocabulary() -> tuple[str, ...]:
    words = {*COLOURS, *COUNT_WORDS, *HITS, *RINGS, *GLUE}
    words |= {word for synonyms in (*SIZE_WORDS.values(), *REGISTER_WORDS) for word in synonyms}
    words |= {word for place in PLACES for word in place.split()}
    for word in (*NOUNS, *MOTIONS, *FALLS, *TONES):
        words |= {word, f"{word}s"}
    return tuple(sorted(words))


# All words of all captions, in alphabetical order.
VOCABULARY = _vocabulary()


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    return re.findall(r"[a-z]+", caption.lower())


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of hundreds of ways to describe a scene."""
    scene = check_scene(scene)

    def pick(options):
        return options[rng.integers(len(options))]

    order = rng.permutation(len(scene))
    balls = [scene[i] for i in order]
    many = len(balls) > 1
    noun, motion, place, hit = pick(NOUNS), pick(MOTIONS), pick(PLACES), pick(HITS)
    sizes = [pick(SIZE_WORDS[ball.size]) for ball in balls]
    registers = [pick(REGISTER_WORDS[COLOURS.index(ball.colour)]) for ball in balls]
    kinds = [f"{size} {ball.colour}" for size, ball in zip(sizes, balls, strict=True)]
    # verbs: "a ball bounces", "two balls bounce"
    bounce, fall = (motion, pick(FALLS)) if many else (f"{motion}s", f"{pick(FALLS)}s")

    named = _join([f"{_article(kind)} {noun}" for kind in kinds])
    count = f"{COUNT_WORDS[len(balls) - 1]} {noun}{'s' * many}"
    listed = _join([f"{_article(kind)} one" for kind in kinds])
    seen = pick(
        (
            f"{named} {bounce} {place}",
            f"{named} {fall} and {bounce} {place}",
            f"{count} {bounce} {place}: {listed}",
            f"{count}, {listed}, {fall} and {bounce} {place}",
            f"there {'are' if many else 'is'} {named} that {bounce} {place}",
            f"we see {named} that {fall} and {bounce} {place}",
        )
    )
    tone, rings = pick(TONES), pick(RINGS)
    tones = _join([f"{_article(register)} {tone}" for register in dict.fromkeys(registers)])
    plural = f"{_join(list(dict.fromkeys(registers)))} {tone}s"
    owners = zip(registers, balls, strict=True)
    each = _join(
        [f"the {ball.colour} one {rings} {_article(word)} {tone}" for word, ball in owners]
    )
    return pick(
        (
            f"{seen}, each {hit} {rings} {tones}",
            f"{seen}, every {hit} {rings} {tones}",
            f"{seen} with {tones} at every {hit}",
            f"{seen}, you hear {plural}",
            f"{seen}; {plural} are heard at each {hit}",
            f"{seen}, {each}",
            f"{plural} ring while {seen}" if seen.startswith(named) else f"{seen}, {plural} ring",
            f"you hear {tones} as {seen}"
            if seen.startswith(named)
            else f"{seen}, we hear {plural}",
        )
    )


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _join(parts: list[str]) -> str:
    """ "x", "x and y", "x, y and z" """
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def scene_from_caption(text: str) -> Scene:
    """The balls that a caption speaks of, in the order in which it first names their colours.

    A size belongs to the colour that follows it; a colour without one is of medium size, and one
    that is named again ("the red one") is the same ball. Other words are skipped, so free prompts
    can be read as well.

    Raises:
      ValueError: no colour of this world or more than three are named, or the caption gives
        another number of balls.
    """
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words}
    found: dict[str, str] = {}
    size, count = None, None
    words = words_of(text)
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word in sizes:
            size = sizes[word]
        elif word in COLOURS:
            found.setdefault(word, size or "medium")
            size = None
        elif word in COUNT_WORDS and following.removesuffix("s") in NOUNS:
            count = COUNT_WORDS.index(word) + 1
    if not found or len(found) > MAX_BALLS or count not in (None, len(found)):
        named = ", ".join(found) or "none"
        raise ValueError(
            f"cannot tell the balls of {text[:80]!r}: a caption names 1 to {MAX_BALLS} different "
            f"colours of {', '.join(COLOURS)}, as many as it has balls, and a size before each "
            f"({', '.join(SIZES)}); colours found: {named}"
        )
    return tuple(Ball(colour, size) for colour, size in found.items())


def with_sound(text: str) -> str:
    """The prompt, and how its balls sound if it does not say, which captions always do.

    A model that has only met captions with both halves plays the tones of one ball alone, and may
    forget the other, where the prompt is silent about them.

    Raises:
      ValueError: as `scene_from_caption`.
    """
    registers = [REGISTER_WORDS[COLOURS.index(b.colour)][0] for b in scene_from_caption(text)]
    tones = {f"{tone}{ending}" for tone in TONES for ending in ("", "s")}
    if tones & set(words_of(text)):
        return text
    return f"{text.rstrip(' .!')}, you hear {_join(list(dict.fromkeys(registers)))} {TONES[0]}s"
