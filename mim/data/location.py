"""What a location of bytes may be, and how it is shown: a local path, or an URL of an allowed scheme.

Nothing here is ever handed to a shell, and no prefix of a name runs anything: `pipe:`, `file:`, `-` and every scheme
that is not listed are refused. Messages show a location only as `redact` leaves it, and a lock never stores one that
holds credentials.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from mim.config import ConfigError

SCHEMES = ("http", "https", "s3", "gs", "hf")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_AUTHORITY = re.compile(
    r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(:[0-9]*)?"
)  # host and port, nothing that could be secret


def is_remote(location: str) -> bool:
    """Whether a location is an URL rather than a local path. Raises ConfigError for what is neither.

    A local path whose first part holds a colon is written with "./" before it.
    """
    match = _SCHEME.match(location)
    if match is None:
        if location in ("", "-"):
            raise ConfigError(f"{location!r} is no location of a shard; give a path or an URL ({_listed()})")
        return False
    scheme = match[1].lower()
    if scheme not in SCHEMES or not location.startswith(f"{scheme}://"):
        raise ConfigError(
            f"a location that begins with {match[0]!r} is refused; use a path (./{match[0]}... if it is a file's name) "
            f"or an URL of {_listed()}"
        )
    shown = redact(location)
    if "@" in location[len(scheme) + 3 :].partition("/")[0] or shown.endswith("://***"):
        raise ConfigError(f"{shown}: credentials do not belong into an address; leave them to the environment")
    if any(character < " " or character == "\x7f" for character in location):
        raise ConfigError(f"{shown!r} holds a control character, which no address has; correct it")
    if not urlsplit(location).hostname:
        raise ConfigError(f"{shown!r} names no host or bucket; write {scheme}://HOST/PATH")
    return True


def check_storable(location: str, where: str) -> None:
    """Refuse a location that a lock must not store. `where` names the lock. Raises ConfigError."""
    if is_remote(location) and ("?" in location or "#" in location):
        raise ConfigError(
            f"{where}: {redact(location)} was given with a query, which may be a signature; a lock stores only plain "
            f"addresses, so use s3://, gs:// or hf:// with credentials in the environment, or an address without one"
        )


def redact(location: str) -> str:
    """A location as messages show it: without userinfo, query and fragment. Every message goes through here."""
    scheme, separator, rest = location.partition("://")
    if not separator:
        return location
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    if _AUTHORITY.fullmatch(host) is None:  # a password with a slash in it, for instance
        return f"{scheme}://***"
    return f"{scheme}://{host}{slash}{path}"


def _listed() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES)
