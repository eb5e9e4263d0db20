"""Values of known classes as plain data, which can be written down and read again.

Unlike a pickle, what is read can make nothing but values of the classes that the reader names.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_PLAIN = (bool, int, float, str)


def to_plain(value: Any, classes: Mapping[str, type]) -> Any:
    """Dicts, lists, strings, numbers, None, and arrays of the host.

    Args:
      value: of these, tuples, arrays of any kind, and dataclasses of `classes`.
      classes: by the names that are written.

    Raises:
      TypeError: it holds something else.
    """
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value)
    if isinstance(value, list):
        return [to_plain(item, classes) for item in value]
    if isinstance(value, tuple):
        return {"class": "tuple", "items": to_plain(list(value), classes)}
    if isinstance(value, dict):
        items = [[to_plain(key, classes), to_plain(x, classes)] for key, x in value.items()]
        return {"class": "dict", "items": items}
    name = type(value).__name__
    if classes.get(name) is not type(value):
        raise TypeError(f"{type(value)} cannot be written down")
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"class": name, "fields": {n: to_plain(x, classes) for n, x in fields.items()}}


def from_plain(value: Any, classes: Mapping[str, type]) -> Any:
    """The value of `to_plain`; arrays are the host's.

    Raises:
      ValueError: it is none.
    """
    if value is None or isinstance(value, (*_PLAIN, np.ndarray)):
        return value
    if isinstance(value, list):
        return [from_plain(item, classes) for item in value]
    try:
        kind = value["class"]
        if kind == "tuple":
            return tuple(from_plain(item, classes) for item in value["items"])
        if kind == "dict":
            return {from_plain(k, classes): from_plain(x, classes) for k, x in value["items"]}
        fields = {name: from_plain(x, classes) for name, x in value["fields"].items()}
        return classes[kind](**fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no value of {', '.join(classes)}: {error}") from error


def to_json(value: Any, classes: Mapping[str, type]) -> str:
    """The same as JSON, with the bytes of arrays in base 64."""

    def array(x: np.ndarray) -> dict[str, Any]:
        data = base64.b64encode(np.ascontiguousarray(x)).decode()
        return {"class": "array", "dtype": x.dtype.name, "shape": x.shape, "data": data}

    return json.dumps(to_plain(value, classes), default=array)


def from_json(text: str, classes: Mapping[str, type]) -> Any:
    """The value of `to_json`.

    Raises:
      ValueError: it is none.
    """

    def array(fields: dict[str, Any]) -> Any:
        if fields.get("class") != "array":
            return fields
        try:
            data = base64.b64decode(fields["data"], validate=True)
            return np.frombuffer(data, np.dtype(fields["dtype"])).reshape(fields["shape"]).copy()
        except (KeyError, TypeError) as error:
            raise ValueError(f"no array: {error}") from error

    return from_plain(json.loads(text, object_hook=array), classes)
