"""Group D, continued: buckets. moto serves them; it checks no keys, so the fault server answers what S3 answers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator

from benchmarks.reliability.bench import Bench, Case, fired
from benchmarks.reliability.fixtures import Fixture
from benchmarks.reliability.serving import pair, read_urls
from benchmarks.reliability.verdicts import LOUD, PASS, SKIPPED, Verdict, delivered, joined, leaked, refused
from tests.fault_server import FaultServer, status

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
    "AWS_SECRET_ACCESS_KEY": "planted-secret",
    "AWS_SESSION_TOKEN": "planted-session",
}
SECRETS = KEYS | {"a signature": "X-Amz-Signature"}
WRONG = {  # what S3 answers: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    "an unknown key": (403, "InvalidAccessKeyId"),
    "a wrong secret": (403, "SignatureDoesNotMatch"),
    "an expired token": (400, "ExpiredToken"),
}
MAX_ASKED = 8  # requests after which one that is refused is asked again and again


def buckets(bench: Bench, reader: str) -> Verdict:
    """D8: everything is delivered; a missing bucket, an outage, wrong and expired keys are refused by name, without a
    secret and without asking again and again."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("botocore") is None:
        return Verdict(SKIPPED, "moto[server] is not installed")
    found = pair(bench)
    urls = [f"s3://photos/{tar.name}" for tar in found.tars]
    with moto(found) as endpoint:
        env = KEYS | {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        whole = delivered(read_urls(bench, reader, found, urls, env=env), found.rows)
        gone = [f"s3://nowhere/{tar.name}" for tar in found.tars]
        missing = refused(read_urls(bench, reader, found, gone, env=env), "nowhere")
    outage = refused(read_urls(bench, reader, found, urls, env=env, limit=150), "photos")
    wrong = [_wrong_keys(bench, reader, found, urls, env, *WRONG[name]).of(name) for name in WRONG]
    return joined([whole.of("delivery"), missing.of("a missing bucket"), outage.of("an outage"), *wrong])


@contextlib.contextmanager
def moto(found: Fixture) -> Iterator[str]:
    """An S3 server with the shards of a fixture in the bucket `photos`; its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print every request
    server = importlib.import_module("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        session = importlib.import_module("botocore.session").get_session()
        session.set_credentials(KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"])
        client = session.create_client("s3", region_name="us-east-1", endpoint_url=endpoint)
        client.create_bucket(Bucket="photos")
        for tar in found.tars:
            client.put_object(Bucket="photos", Key=tar.name, Body=tar.read_bytes())
        yield endpoint
    finally:
        server.stop()


def _wrong_keys(
    bench: Bench, reader: str, found: Fixture, urls: list[str], env: dict[str, str], code: int, word: str
) -> Verdict:
    cache = bench.scratch()
    body = f"<Error><Code>{word}</Code><AWSAccessKeyId>{KEYS['AWS_ACCESS_KEY_ID']}</AWSAccessKeyId></Error>".encode()
    with FaultServer() as server:
        paths = [f"/photos/{tar.name}" for tar in found.tars]
        for path in paths:
            server.put(path, b"", then=status(code, body=body))
        results = read_urls(bench, reader, found, urls, cache=cache, env=env | {"AWS_ENDPOINT_URL_S3": server.url("")})
        asked = sum(len(server.fired[path]) for path in paths)
    written = [file for file in cache.parent.rglob("*") if file.is_file()]
    verdict = leaked(SECRETS, results, written) or refused(results, "photos", word)
    if verdict.kind == PASS:
        fired(asked, f"the server did not answer {word}")
    return Verdict(LOUD, f"{asked} requests were made") if asked > MAX_ASKED else verdict


CASES = (Case("D8", "S3: delivery, missing bucket, outage, wrong keys", buckets),)
