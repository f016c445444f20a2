"""What is known of a finished shard, as JSON beside it: a killed `make` reads it instead of doing the work again.

Plain values, numpy arrays and the classes of RESTORED, by name; nothing else is written, and nothing else is built from
what is read.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mim.contracts import DataError
from mim.log import write_json


def save(file: Path, value: Any) -> None:
    """Write a value aside, then rename it."""
    write_json(file, _plain(value))


def load(file: Path, *classes: type) -> Any:
    """Read what `save` wrote; objects become those of `classes`. DataError when the file is anything else."""
    try:
        return _restored(json.loads(file.read_bytes()), {kind.__name__: kind for kind in classes})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} holds no facts of a shard ({error!r}); delete it") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {"array": _plain(value.ravel().tolist()), "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, (list, tuple, set)):
        return {type(value).__name__: [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]}
    if isinstance(value, (Counter, dict)):
        name = "Counter" if isinstance(value, Counter) else "dict"
        return {name: [[_plain(key), _plain(item)] for key, item in value.items()]}
    return {"object": type(value).__name__, "fields": {name: _plain(item) for name, item in vars(value).items()}}


def _restored(value: Any, classes: dict[str, type]) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        flat = [_restored(item, classes) for item in value["array"]["list"]]
        return np.array(flat, dtype=value["dtype"]).reshape(value["shape"])
    if "object" in value:
        made: Any = object.__new__(classes[value["object"]])
        vars(made).update({name: _restored(item, classes) for name, item in value["fields"].items()})
        return made
    [(name, items)] = value.items()
    if name in ("Counter", "dict"):
        pairs = {_restored(key, classes): _restored(item, classes) for key, item in items}
        return Counter(pairs) if name == "Counter" else pairs
    return {"list": list, "tuple": tuple, "set": set}[name](_restored(item, classes) for item in items)
