"""Lists of video files with captions, for training: a CSV or JSONL file, or a folder.

clips.csv        caption,video          beside, or with absolute paths to, the video files
folder/a.txt     the caption of         folder/a.mp4 (or another format that FFmpeg reads)
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent import futures

from omniforcing_jax.io import media_files
from omniforcing_jax.text.prompt_files import PromptList, prompt_hash, read_column, read_prompts

_READERS = 16  # threads that look at files


@dataclasses.dataclass(frozen=True)
class ClipFile:
    """A clip that can be used.

    Attributes:
      path: of the video.
      name: the same as the list has it.
      caption: what it shows.
      prompt: the caption's number in `ClipList.prompts`.
    """

    path: pathlib.Path
    name: str
    caption: str
    prompt: int


@dataclasses.dataclass(frozen=True)
class ClipList:
    """The clips of a list, but for those that cannot be used.

    Attributes:
      clips: each content once, in the list's order.
      prompts: all captions of the list, as `launch.encode_prompts` reads them.
      num_read: rows of the list.
      num_duplicates: clips whose content had appeared before.
      unusable: why each of the others is left out, with its place in the list.
    """

    clips: tuple[ClipFile, ...]
    prompts: PromptList
    num_read: int
    num_duplicates: int
    unusable: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of names, sizes and captions of the clips, and their order."""
        digest = hashlib.sha256()
        for clip in self.clips:
            size = clip.path.stat().st_size
            digest.update(f"{clip.name}\0{size}\0{prompt_hash(clip.caption)}\0".encode())
        return digest.hexdigest()


def read_clip_list(
    path: str | os.PathLike,
    *,
    height: int,
    width: int,
    seconds: float,
    caption_column: str | None = None,
    video_column: str = "video",
) -> ClipList:
    """Reads a list and looks at the beginning of every file in it.

    Args:
      path: `.csv`, `.jsonl` or a folder; see the module.
      height, width: of the clips to be made, in pixels.
      seconds: they last so long.
      caption_column, video_column: names of the columns or keys.

    Raises:
      FileNotFoundError: there is no such list.
      ValueError: it cannot be read (see `read_column`), or holds no clip that can be used.
    """
    path = pathlib.Path(path)
    prompts = read_prompts(path, caption_column)
    numbers = {prompt: number for number, prompt in enumerate(prompts.prompts)}
    rows = list(_rows(path, caption_column, video_column))
    unusable = [problem for problem in rows if isinstance(problem, str)]
    found = [
        ClipFile(file, name, caption, numbers[caption])
        for file, name, caption in (row for row in rows if not isinstance(row, str))
    ]
    with futures.ThreadPoolExecutor(_READERS) as pool:
        problems = pool.map(lambda clip: _problem(clip.path, height, width, seconds), found)
        usable = []
        for clip, problem in zip(found, problems, strict=True):
            if problem is None:
                usable.append(clip)
            else:
                unusable.append(problem)
    clips = _distinct(usable)
    if not clips:
        reason = f"; the first reason: {unusable[0]}" if unusable else ""
        raise ValueError(f"{path}: none of {len(rows)} clips can be used{reason}")
    return ClipList(
        clips=tuple(clips),
        prompts=prompts,
        num_read=len(rows),
        num_duplicates=len(usable) - len(clips),
        unusable=tuple(unusable),
    )


def _rows(
    path: pathlib.Path, caption_column: str | None, video_column: str
) -> Iterator[tuple[pathlib.Path, str, str] | str]:
    """File, name and caption of each row; or what is wrong with it."""
    if path.is_dir():
        for caption_file in sorted(path.glob("*.txt")):
            caption = caption_file.read_text(encoding="utf-8-sig").strip()
            beside = [x for x in sorted(path.glob("*")) if _belongs(x, caption_file)]
            if not caption or len(beside) != 1:
                what = f"{len(beside)} clips beside it" if caption else "no caption in it"
                yield f"{caption_file}: {what}"
            else:
                yield beside[0], beside[0].name, caption
        return
    if path.suffix.lower() == ".txt":
        raise ValueError(f"{path}: a list of clips is a .csv, a .jsonl or a folder, not a .txt")
    captions = read_column(path, caption_column)
    for (line, caption), (_, name) in zip(captions, read_column(path, video_column), strict=True):
        caption, name = caption.strip(), name.strip()
        if caption and name:
            yield path.parent / name, name, caption
        elif caption or name:
            yield f"{path}, line {line}: no {'video' if caption else 'caption'}"


def _belongs(file: pathlib.Path, caption_file: pathlib.Path) -> bool:
    return file.stem == caption_file.stem and file != caption_file and file.is_file()


def _problem(path: pathlib.Path, height: int, width: int, seconds: float) -> str | None:
    """Why a file cannot be used, as far as its beginning shows."""
    try:
        clip = media_files.describe_clip(path)
        media_files.check_enlargement((clip.height, clip.width), height, width, path)
    except (OSError, ValueError) as error:
        return str(error)
    if not clip.has_sound:
        return f"{path} has no sound: there is no audio track in it"
    if clip.seconds is not None and clip.seconds < seconds - 0.5 / media_files.SOUND_RATE_STEP:
        return f"{path} is too short: {clip.seconds:.2f} s of the {seconds:.2f} s that are needed"
    return None


def _distinct(clips: Sequence[ClipFile]) -> list[ClipFile]:
    """The first clip of each content. Only files of equal size are read."""
    by_size: dict[int, list[ClipFile]] = {}
    for clip in clips:
        by_size.setdefault(clip.path.stat().st_size, []).append(clip)
    again = set()
    for same in by_size.values():
        seen = set()
        for clip in same if len(same) > 1 else ():
            content = _content_hash(clip.path)
            if content in seen:
                again.add(id(clip))
            seen.add(content)
    return [clip for clip in clips if id(clip) not in again]


def _content_hash(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
