"""URL -> where to ask and with which credentials: s3://, gs:// and hf:// become signed http(s) requests.

Credentials come from the standard chain of each service's own library (botocore, google-auth, huggingface_hub) at the
moment of a request, so they can expire and be renewed; they are held in memory only. Everything after that is one
transport, `mim.data.remote`.

    s3://BUCKET/KEY                            an URL presigned by botocore for an hour (any S3-compatible endpoint)
    gs://BUCKET/KEY                            a bearer token of google-auth
    hf://datasets/OWNER/NAME[@REVISION]/PATH   a bearer token of huggingface_hub if there is one; models/ likewise
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import quote, urlsplit

from mim.config import ConfigError
from mim.contracts import StorageError
from mim.data.location import redact

GOOGLE = "https://storage.googleapis.com"
HUGGING_FACE = "https://huggingface.co"
HUGGING_FACE_CDN = (".hf.co", ".huggingface.co")  # its files lie there; any other host is refused
SIGNED_FOR = 3600  # seconds; one request, not a run


@dataclass(frozen=True)
class Target:
    """One http(s) request for an object."""

    url: str = field(repr=False)  # may hold a signature
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    redirect_domains: tuple[str, ...] = ()  # other hosts that this service may send us to, over https
    if_match: bool = True  # False where the first host's ETag is not that of the host it redirects to


class Endpoints:
    """Signs requests; keeps the session of each service. One per process and thread."""

    def __init__(self) -> None:
        self._s3: Any = None
        self._google: Any = None

    def target(self, url: str) -> Target:
        """Return the request for an URL. Raises ConfigError (no library for it) and StorageError (no credentials)."""
        scheme = urlsplit(url).scheme
        if scheme in ("http", "https"):
            return Target(url)
        return {"s3": self._sign_s3, "gs": self._sign_google, "hf": self._sign_hugging_face}[scheme](url)

    def _sign_s3(self, url: str) -> Target:
        exceptions = _library("botocore.exceptions", url)
        bucket, key = _bucket_and_key(url)
        try:
            if self._s3 is None:
                config = _library("botocore.config", url).Config(signature_version="s3v4")
                session = _library("botocore.session", url).get_session()
                region = session.get_config_variable("region") or "us-east-1"
                self._s3 = session.create_client("s3", region_name=region, config=config)
            parameters = {"Bucket": bucket, "Key": key}
            return Target(self._s3.generate_presigned_url("get_object", Params=parameters, ExpiresIn=SIGNED_FOR))
        except (exceptions.BotoCoreError, ValueError) as error:
            raise StorageError(
                f"cannot sign the request for {redact(url)} ({type(error).__name__}); set AWS credentials, or use the "
                f"bucket's https:// address if it is public"
            ) from None

    def _sign_google(self, url: str) -> Target:
        auth, transport = _library("google.auth", url), _library("google.auth.transport.urllib3", url)
        bucket, key = _bucket_and_key(url)
        try:
            if self._google is None:
                scope = "https://www.googleapis.com/auth/devstorage.read_only"
                self._google, _ = auth.default(scopes=[scope])
            if not self._google.valid:
                self._google.refresh(transport.Request(_library("urllib3", url).PoolManager()))
        except auth.exceptions.GoogleAuthError as error:
            raise StorageError(
                f"no credentials for {redact(url)} ({type(error).__name__}); log in with gcloud, or use "
                f"{GOOGLE}/{bucket}/... if the bucket is public"
            ) from None
        return Target(f"{GOOGLE}/{bucket}/{quote(key)}", {"Authorization": f"Bearer {self._google.token}"})

    def _sign_hugging_face(self, url: str) -> Target:
        kind, _, rest = url.removeprefix("hf://").partition("/")
        owner, _, rest = rest.partition("/")
        name, _, path = rest.partition("/")
        name, _, revision = name.partition("@")
        if kind not in ("datasets", "models") or not (owner and name and path):
            raise ConfigError(f"{redact(url)!r} is no file of a hub; write hf://datasets/OWNER/NAME[@REVISION]/PATH")
        token = _library("huggingface_hub", url).get_token()
        repository = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
        return Target(
            f"{HUGGING_FACE}/{repository}/resolve/{quote(revision or 'main', safe='')}/{quote(path)}",
            {"Authorization": f"Bearer {token}"} if token else {},
            redirect_domains=HUGGING_FACE_CDN,
            if_match=False,
        )


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.partition("://")[2].partition("/")
    if not key:
        raise ConfigError(f"{redact(url)!r} names no object; write {urlsplit(url).scheme}://BUCKET/KEY")
    return bucket, key


def _library(name: str, url: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"reading {redact(url)} needs {name.partition('.')[0]}; install it: pip install 'mimstream[remote]'"
        ) from error
