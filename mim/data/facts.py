"""What is known of a finished shard, as JSON beside it: a killed `make` reads it instead of doing the work again.

Plain values, numpy arrays and the classes of RESTORED, by name; nothing else is written, and nothing else is built from
what is read.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mim.contracts import DataError
from mim.log import write_json


def save(file: Path, value: Any) -> None:
    """Write a value aside, then rename it."""
    write_json(file, plain(value))


def load(file: Path, *classes: type) -> Any:
    """Read what `save` wrote. Raises DataError when the file holds anything else."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise _strange(file, error) from error
    return restored(content, file, *classes)


def restored(value: Any, source: Path | str, *classes: type) -> Any:
    """Undo `plain`; objects become those of `classes`. Raises DataError, naming the source, for anything else."""
    try:
        return _build(value, {kind.__name__: kind for kind in classes})
    except (ValueError, KeyError, TypeError) as error:
        raise _strange(source, error) from error


def plain(value: Any) -> Any:
    """A value as JSON can hold it; numbers of an array as base64 of their bytes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        as_objects = value.dtype == object  # integers of any size
        flat = plain(value.ravel().tolist()) if as_objects else base64.b64encode(value.tobytes()).decode()
        return {"array": flat, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, (list, tuple, set)):
        return {type(value).__name__: [plain(item) for item in (sorted(value) if isinstance(value, set) else value)]}
    if isinstance(value, (Counter, dict)):
        name = "Counter" if isinstance(value, Counter) else "dict"
        return {name: [[plain(key), plain(item)] for key, item in value.items()]}
    return {"object": type(value).__name__, "fields": {name: plain(item) for name, item in vars(value).items()}}


def _build(value: Any, classes: dict[str, type]) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        flat, dtype = value["array"], np.dtype(value["dtype"])
        if isinstance(flat, str):
            return np.frombuffer(base64.b64decode(flat, validate=True), dtype).reshape(value["shape"]).copy()
        return np.array([_build(item, classes) for item in flat["list"]], dtype).reshape(value["shape"])
    if "object" in value:
        made: Any = object.__new__(classes[value["object"]])
        vars(made).update({name: _build(item, classes) for name, item in value["fields"].items()})
        return made
    [(name, items)] = value.items()
    if name in ("Counter", "dict"):
        pairs = {_build(key, classes): _build(item, classes) for key, item in items}
        return Counter(pairs) if name == "Counter" else pairs
    return {"list": list, "tuple": tuple, "set": set}[name](_build(item, classes) for item in items)


def _strange(source: Path | str, error: Exception) -> DataError:
    return DataError(f"{source} holds no facts of a shard ({error!r}); delete it")
