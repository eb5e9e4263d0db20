"""Safetensors files of arrays in memory, for the tests of the converters."""

from checkpoint_converters.safetensors_io import read_header, read_tensor, write_safetensors


def read_file(path):
    """({key: array}, metadata)."""
    tensors, metadata = read_header(path)
    return {key: read_tensor(info) for key, info in tensors.items()}, metadata


def write_file(path, arrays, metadata=None):
    """Writes {key: array}; returns the path."""
    table = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    write_safetensors(path, table, metadata or {}, arrays.__getitem__)
    return path


def rewrite_file(source, target, change=lambda arrays: None, metadata=None):
    """Copies a file, with `change` applied to {key: array} and other metadata; returns the path."""
    arrays, strings = read_file(source)
    change(arrays)
    return write_file(target, arrays, strings if metadata is None else metadata)
