"""What it means when a server's answer is not the bytes: another attempt may help, or one sentence ends the run.

Remedies are told by status, and by the word with which S3 and its like name an error in the body of the answer.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import time
from urllib.parse import urlsplit

from mim.contracts import StorageError
from mim.data.endpoint import Target
from mim.data.location import redact

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
CODE = re.compile(rb"<Code>(\w{1,64})</Code>")  # in the body of an error of S3 and its like: what is wrong in a word
REMEDIES: dict[int | str, str] = {  # by status, and by that word where it says more
    401: "; it asks for credentials",
    403: "; check the credentials and their rights",
    404: "; check the address",
    "ExpiredToken": "; the credentials have expired, renew them",
    "InvalidAccessKeyId": "; nobody has this access key there, check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "; the secret key does not belong to the access key, check both",
    "RequestTimeTooSkewed": "; the clock of this machine is wrong, set it",
}


class Transient(Exception):
    """A fault that another attempt may not meet."""

    def __init__(self, reason: str, *, wait: float = 0.0, unreachable: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.unreachable = unreachable


def check_status(url: str, response: http.client.HTTPResponse) -> None:
    """Raise Transient or StorageError for an answer that is an error."""
    status = response.status
    fact = f"the server answers {status} {http.client.responses.get(status, '')}".rstrip()
    if status in TRANSIENT:
        raise Transient(fact, wait=retry_after(response.getheader("Retry-After")))
    code = code_of(response)
    fact += f" ({code})" if code else ""
    remedy = REMEDIES.get(code, REMEDIES.get(status, ""))
    if region := response.getheader("x-amz-bucket-region"):  # the usual reason, and S3 tells no other
        remedy += f"; its bucket lies in {region}, set AWS_DEFAULT_REGION={region} if yours is another"
    raise StorageError(f"cannot read {redact(url)}: {fact}{remedy}")


def same_host(where: str, location: str) -> bool:
    one, other = urlsplit(where), urlsplit(location)
    return (one.scheme, one.netloc) == (other.scheme, other.netloc)


def check_redirect(url: str, target: Target, location: str) -> None:
    """Let a service send us to the hosts of its own, over https; refuse every other host."""
    parts = urlsplit(location)
    host = parts.hostname or ""
    if parts.scheme == "https" and "@" not in parts.netloc and host.endswith(target.redirect_domains or ("\0",)):
        return
    raise StorageError(
        f"{redact(url)} redirects to {redact(location)}; redirects are followed inside one host and scheme only, so "
        f"give the address that it leads to"
    )


def code_of(response: http.client.HTTPResponse) -> str:
    """The word by which S3 names an error; "" when there is none."""
    try:
        found = CODE.search(response.read(4096))
    except (OSError, http.client.HTTPException):
        return ""
    return found[1].decode() if found else ""


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 for anything else."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
