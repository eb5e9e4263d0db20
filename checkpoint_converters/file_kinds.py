"""What a file is that is not safetensors, by its first bytes."""

import pathlib

_SAFETENSORS = "download the model's .safetensors file instead"
_PYTORCH = (
    "is a PyTorch file (.pt, .pth, .bin), which can run code when it is opened, so it is not read; "
    "download the .safetensors file, or save one with PyTorch and safetensors.torch.save_file"
)
# (what a file begins with, what it is and what would be right)
_BEGINNINGS = (
    (b"GGUF", f"is a GGUF file, whose block-wise quantised weights are not read; {_SAFETENSORS}"),
    (b"PK\x03\x04", f"is a zip archive; unpack it, or {_SAFETENSORS}"),
    (b"\x80\x02", _PYTORCH),
    (b"\x80\x04", _PYTORCH),
    (b"\x80\x05", _PYTORCH),
    (
        b"version https://git-lfs.github.com/spec",
        "is a Git LFS pointer of a few lines, not the weights; fetch them with `git lfs pull`, or "
        "download the file itself",
    ),
    (b"\x1f\x8b", f"is a gzip archive; unpack it, or {_SAFETENSORS}"),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_PEEK = 1024


def is_pytorch(path: pathlib.Path) -> bool:
    """Whether it is a file of PyTorch's own, which is a pickle inside."""
    return path.is_file() and what_else(path) == _PYTORCH


def what_else(path: pathlib.Path) -> str | None:
    """What is wrong with a file that is no safetensors file at all, None if it may be one."""
    with path.open("rb") as file:
        start = file.read(_PEEK)
    if not start:
        return "is empty; download it again"
    if start[4:9] == b"\0\0\0\0{":  # a length that may begin like anything, then JSON
        return None
    if start.startswith(b"PK") and b"data.pkl" in start:
        return _PYTORCH
    for beginning, text in _BEGINNINGS:
        if start.startswith(beginning):
            return text
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES):
        return (
            "is a web page, such as the login page that a site sends in place of a file; log in, "
            "accept the model's licence there, and download the file again"
        )
    if text.startswith(b'{"error"') or text.startswith(b"access to model"):
        return "is the error message of a server, not the file; log in and download it again"
    if len(start) > 8 and not any(start):
        return "begins with zeros, so its download was not finished; download it again"
    return None
