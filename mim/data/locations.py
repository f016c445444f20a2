"""Where tars lie, as a user names them: files, folders, URLs, and braces for numbered ones -> one location per tar.

Nothing is opened by a shell: a location is a local file or a URL of a known scheme. A location stands in a lock that
others read, so a URL with credentials in it (user, password, signature) is refused.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

from braceexpand import braceexpand

from mim.config import ConfigError
from mim.data.location import SCHEMES, check_storable, is_remote
from mim.data.store import Store

MAX_TARS = 1_000_000


def expand(urls: list[str]) -> list[str]:
    """Return the locations that arguments name, in their order: absolute paths and URLs. Raises ConfigError."""
    found = [location for url in urls for location in (_remote(url) if "://" in url else _local(url))]
    if not found:
        raise ConfigError("no tars are named; give files, folders of tars, or URLs")
    if twice := [location for location, count in Counter(found).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is named twice")
    return found


def names(locations: list[str]) -> list[str]:
    """Return a file name for each location, unique also without its ending: its own, or with its number before it."""
    plain = [location.rstrip("/").rpartition("/")[2] for location in locations]
    if len({Path(name).with_suffix("").name for name in plain}) == len(plain):
        return plain
    return [f"{number:06d}-{name}" for number, name in enumerate(plain)]


def mark(location: str, store: Store) -> str | None:
    """What changes when a tar changes, known without reading it; None when its server tells nothing but the size."""
    size = store.size(location)
    if is_remote(location):
        etag = store.remote.identify(location).etag
        return f"{size} {etag}" if etag is not None else None
    return f"{size} {os.stat(location).st_mtime_ns}"


def _remote(url: str) -> list[str]:
    found = _braces(url)
    for location in found:
        check_storable(location, "the lock of OUT")
    return found


def _local(text: str) -> list[str]:
    path = Path(text)
    if path.is_dir():
        tars = sorted(str(file) for file in path.rglob("*.tar") if file.is_file() and not file.name.startswith("."))
        if not tars:
            raise ConfigError(f"{path} holds no .tar files; name the tars, or the folder that holds them")
        return [os.path.abspath(file) for file in tars]
    found = [text] if path.exists() or "{" not in text else _braces(text)
    for location in found:
        if not Path(location).is_file():
            scheme, colon, _ = location.partition(":")
            hint = f" ({scheme}: is not read; known are {', '.join(SCHEMES)})" if colon and scheme.isalnum() else ""
            raise ConfigError(f"{location} is no file{hint}; name a tar, a folder of tars, or a URL")
    return [os.path.abspath(location) for location in found]


def _braces(text: str) -> list[str]:
    try:
        found = list(itertools.islice(braceexpand(text), MAX_TARS + 1))
    except ValueError as error:  # UnbalancedBracesError
        raise ConfigError(f"{text} has unbalanced braces; write e.g. part-{{000..012}}.tar") from error
    if len(found) > MAX_TARS:
        raise ConfigError(f"{text} names more than {MAX_TARS} tars")
    return found
