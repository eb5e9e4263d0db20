"""Whether weights are what was published, where their SHA-256 is known.

The hub's cache names a file by it (a link into `blobs/`), a folder that was downloaded to keeps it
in `.cache/huggingface/download/`, and others come with a list, `SHA256SUMS`. Official files carry
no checksum inside.
"""

import os
import pathlib
import re
from collections.abc import Iterable

from omniforcing_jax.io import checksums

_DIGEST = re.compile(r"[0-9a-f]{64}")


def damaged(files: Iterable[pathlib.Path]) -> list[str]:
    """The files that have another checksum than they should; hashes those whose it is known."""
    known = {file: digest for file in files if (digest := known_checksum(pathlib.Path(file)))}
    found = checksums.hash_files(list(known))
    return [
        f"{file}: is damaged (its SHA-256 is not that of what was published); download it again"
        for (file, digest), other in zip(known.items(), found, strict=True)
        if digest != other
    ]


def known_checksum(file: pathlib.Path) -> str | None:
    """SHA-256 of a file as it was published; None if nobody says, or the file was changed since."""
    blob = pathlib.Path(os.path.realpath(file))
    if blob.parent.name == "blobs" and _DIGEST.fullmatch(blob.name):
        return blob.name
    for folder in file.absolute().parents[:3]:
        name = file.absolute().relative_to(folder)
        note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        if note.is_file():
            _, tag, when = (*note.read_text().split(), "", "", "")[:3]
            try:
                unchanged = file.stat().st_mtime <= float(when) + 1
            except ValueError:
                unchanged = False
            return tag if unchanged and _DIGEST.fullmatch(tag) else None
    listed = file.parent / checksums.FILE
    if listed.is_file():
        lines = (line.split() for line in listed.read_text(errors="replace").splitlines())
        sums = {words[1].lstrip("*"): words[0] for words in lines if len(words) == 2}
        digest = sums.get(file.name, "")
        return digest if _DIGEST.fullmatch(digest) else None
    return None
