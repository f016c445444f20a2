import ipaddress
import os
import pickle
import random
import socket
import ssl
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from fault_server import Fault, FaultServer, cut, redirect, stall, status, trickle

from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data import endpoint
from mim.data.remote import Remote
from mim.data.wire import ForbiddenAddress, Patience, check_address

BODY = random.Random(0).randbytes(300_000)
HASTE = Patience(
    connect=2, silence=0.5, min_rate=50_000, total=5, unreachable=0.3, first_wait=0.01, longest_wait=0.1
)  # what takes seconds in earnest
SECRETS = ("hunter2", "SIGNATURE", "X-Amz-Signature", "hf_planted", "AKIAPLANTED", "planted-secret", "ya29.planted")


@pytest.fixture
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def remote():
    opened = Remote(HASTE)
    yield opened
    opened.close()


def assert_recovers(server, remote, faults):
    """With the faults in its way, a read returns the right bytes; and each fault has happened."""
    url = server.put("/a.tar", BODY, faults=faults)
    assert remote.pread(url, 1000, 250_000) == BODY[1000:251_000]
    assert server.fired["/a.tar"] == [fault.name for fault in faults]


def assert_fails(server, remote, fault, kind, message):
    """A fault that does not go away becomes one sentence without secrets."""
    url = server.put("/a.tar", BODY, then=fault) + "?X-Amz-Signature=SIGNATURE"
    with pytest.raises(kind, match=message) as raised:
        remote.pread(url, 0, 100_000)
    assert server.fired["/a.tar"]
    assert_no_secret(raised.value)
    assert "/a.tar" in str(raised.value)
    return str(raised.value)


def assert_no_secret(error):
    """Neither the message nor anything that a traceback prints of its causes holds one of the planted secrets."""
    printed = "".join(traceback.format_exception(error))
    assert str(error) in printed
    assert not [secret for secret in SECRETS if secret in printed]


def test_any_range_is_read_exactly(server, remote):
    url = server.put("/a.tar", BODY)
    rng = random.Random(1)
    for _ in range(50):
        start = rng.randrange(len(BODY))
        size = rng.randrange(len(BODY) - start)
        assert remote.pread(url, start, size) == BODY[start : start + size]
    assert remote.identify(url) == (len(BODY), '"1"')


def test_reads_of_one_host_share_a_connection(server, remote):
    connects = []
    url = server.put("/a.tar", BODY)
    sys.addaudithook(lambda event, args: connects.append(args) if event == "socket.connect" else None)
    for offset in range(20):
        remote.pread(url, offset, 10)
    assert server.count("/a.tar") == 20
    assert len([args for args in connects if args[1][1] == server.port]) == 1


def test_an_empty_object_has_size_0(server, remote):
    url = server.put("/empty.tar", b"")
    assert remote.identify(url).size == 0
    assert remote.pread(url, 0, 0) == b""


def test_an_object_that_ends_early_is_a_data_error(server, remote):
    url = server.put("/a.tar", BODY)
    with pytest.raises(DataError, match=r"/a\.tar ends at byte 300000, 50 bytes short"):
        remote.pread(url, 299_950, 100)
    with pytest.raises(DataError, match="ends at byte 300000, 7 bytes short"):
        remote.pread(url, 400_000, 7)


def test_server_errors_are_retried(server, remote):
    assert_recovers(server, remote, [status(500), status(503), status(502)])


@pytest.mark.parametrize("wanted", ["1", "3600", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_retry_after_is_honoured_up_to_a_cap(server, remote, wanted, monkeypatch):
    waits, sleep = [], time.sleep
    monkeypatch.setattr("mim.data.remote.time.sleep", lambda s: (waits.append(s), sleep(s)))
    url = server.put("/a.tar", BODY, faults=[status(429, **{"Retry-After": wanted})])
    remote.pread(url, 0, 10)
    assert server.fired["/a.tar"] == ["status 429"]
    assert waits == [HASTE.longest_wait]


def test_a_server_that_only_says_wait_fails_at_the_deadline(server):
    remote = Remote(Patience(total=1, first_wait=0.01, longest_wait=0.1))
    url = server.put("/a.tar", BODY, then=status(429, **{"Retry-After": "3600"}))
    with pytest.raises(StorageError, match=r"/a\.tar: the server answers 429 Too Many Requests \(\d+ attempts in"):
        remote.pread(url, 0, 10)
    assert server.count("/a.tar") > 1


@pytest.mark.parametrize(("code", "words"), [(404, "404 Not Found"), (403, "403 Forbidden"), (401, "credentials")])
def test_a_refusal_is_told_at_once(server, remote, code, words):
    assert_fails(server, remote, status(code), StorageError, words)
    assert server.count("/a.tar") == 1


def test_a_refused_connection_is_told_soon(remote):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar?sig=SIGNATURE"
        with pytest.raises(StorageError, match=r"/a\.tar: no connection \(.*refused") as raised:
            remote.pread(url, 0, 1)
    assert_no_secret(raised.value)


def test_an_unknown_host_is_told_soon(remote, monkeypatch):
    def unknown(*_args, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("mim.data.remote.socket.getaddrinfo", unknown)
    with pytest.raises(StorageError, match=r"nowhere\.invalid/a\.tar: the name of the host is not known"):
        remote.pread("https://nowhere.invalid/a.tar", 0, 1)


def test_an_outage_of_a_host_that_answered_before_is_waited_for(server, monkeypatch):
    remote, refusals, connect = Remote(replace(HASTE, unreachable=0)), [], socket.create_connection

    def refuse_thrice(*args, **options):
        if len(refusals) < 3:
            refusals.append(args)
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(*args, **options)

    url = server.put("/a.tar", BODY)
    remote.pread(url, 0, 10)
    remote.close()
    monkeypatch.setattr("mim.data.wire.socket.create_connection", refuse_thrice)
    assert remote.pread(url, 7, 10) == BODY[7:17]
    assert len(refusals) == 3
    refusals.clear()
    with pytest.raises(StorageError, match=r"refused\) \(1 attempts"):
        Remote(remote.patience).pread(url, 0, 10)


@pytest.mark.parametrize("length", [True, False], ids=["length", "no-length"])
@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
def test_a_body_cut_anywhere_is_completed_and_never_short(server, remote, length, reset):
    rng = random.Random(2)
    for number in range(50):
        places = sorted(rng.randrange(0, 60_000, 512 if number % 2 else 1) for _ in range(2))
        url = server.put(f"/{number}.tar", BODY, faults=[cut(at, reset=reset, length=length) for at in places])
        assert remote.pread(url, 512, 100_000) == BODY[512:100_512]
        assert len(server.fired[f"/{number}.tar"]) == 2


def test_a_resumed_body_asks_only_for_the_rest_of_the_same_object(server, remote):
    assert_recovers(server, remote, [cut(100_000)])
    second = server.requests["/a.tar"][1]
    assert second["If-Match"] == '"1"'
    assert second["Range"] == "bytes=101000-250999"


def test_a_body_that_is_always_cut_before_its_first_byte_fails_at_the_deadline(server):
    remote = Remote(Patience(total=0.3, first_wait=0.01, longest_wait=0.05))
    message = assert_fails(server, remote, cut(0), StorageError, "ended 100000 bytes early")
    assert "attempts" in message


def test_a_stalled_body_is_given_up_and_resumed(server, remote):
    assert_recovers(server, remote, [stall(80_000)])
    assert server.requests["/a.tar"][1]["Range"] == "bytes=81000-250999"


def test_a_server_that_accepts_and_never_answers_is_given_up(server, remote):
    assert_recovers(server, remote, [Fault("silence", silent=True)])


def test_a_trickle_is_given_up_and_resumed(server, remote):
    assert_recovers(server, remote, [trickle(2_000)])


def test_a_trickle_of_headers_is_given_up(server, remote):
    assert_recovers(server, remote, [Fault("slow head", head_rate=100)])


def test_a_trickle_that_never_ends_fails_at_the_deadline(server):
    remote = Remote(Patience(silence=0.1, min_rate=200_000, total=0.3, first_wait=0.01, longest_wait=0.05))
    assert_fails(server, remote, trickle(1_000), StorageError, r"bytes/s, less than|no byte for|deadline")


@pytest.mark.parametrize("change", ["etag", "size"])
def test_an_object_that_changes_during_a_run_is_a_data_error(server, remote, change):
    url = server.put("/a.tar", BODY)
    remote.pread(url, 0, 10)
    server.put("/a.tar", BODY if change == "etag" else BODY[:-1], etag='"2"' if change == "etag" else '"1"')
    with pytest.raises(DataError, match=r"/a\.tar was overwritten"):
        remote.pread(url, 0, 10)


def test_an_object_that_changes_between_two_attempts_is_never_mixed(server, remote):
    url = server.put("/a.tar", BODY, faults=[cut(1000), Fault("new", etag='"2"')])
    with pytest.raises(DataError, match="was overwritten"):
        remote.pread(url, 0, 5000)
    assert server.fired["/a.tar"] == ["cut", "new"]


def test_without_an_etag_the_size_still_tells_a_change(server, remote):
    url = server.put("/a.tar", BODY, etag=None)
    assert remote.pread(url, 5, 10) == BODY[5:15]
    server.put("/a.tar", BODY + b"more", etag=None)
    with pytest.raises(DataError, match="was overwritten"):
        remote.pread(url, 5, 10)


def test_a_weak_etag_is_compared_but_not_sent(server, remote):
    url = server.put("/a.tar", BODY, etag='W/"1"')
    remote.pread(url, 0, 10)
    remote.pread(url, 0, 10)
    assert "If-Match" not in server.requests["/a.tar"][1]
    server.put("/a.tar", BODY, etag='W/"2"')
    with pytest.raises(DataError, match="was overwritten"):
        remote.pread(url, 0, 10)


def test_a_server_without_ranges_serves_the_whole_and_refuses_parts(server, remote):
    url = server.put("/a.tar", BODY, then=Fault("no ranges", ranges=False))
    assert remote.pread(url, 0, len(BODY)) == BODY
    with pytest.raises(StorageError, match="answers no range requests"):
        remote.pread(url, 10, 10)


def test_a_length_that_is_no_number_is_not_believed(server, remote):
    strange = Fault("strange length", status=200, headers={"Content-Length": "many"})
    assert_fails(server, remote, strange, StorageError, "answers no range requests")


def test_another_range_than_the_one_asked_for_is_never_taken(server, remote):
    wrong = Fault("wrong range", content_range="bytes 0-249999/300000")
    assert_recovers(server, remote, [wrong])


def test_a_redirect_inside_the_host_is_followed(server, remote):
    url = server.put("/a.tar", b"", faults=[redirect("/b.tar"), redirect("/b.tar", 307)])
    server.put("/b.tar", BODY)
    assert remote.pread(url, 3, 10) == BODY[3:13]
    assert server.fired["/a.tar"] == ["redirect"]


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
        "http://elsewhere.invalid/a.tar",
        "https://127.0.0.1/a.tar",
        "ftp://127.0.0.1/a.tar",
        "http://user:hunter2@127.0.0.1/a.tar",
    ],
)
def test_a_redirect_to_anywhere_else_is_refused(server, remote, location):
    connects = []
    sys.addaudithook(lambda event, args: connects.append(args[1]) if event == "socket.connect" else None)
    assert_fails(server, remote, redirect(location), StorageError, "redirects are followed inside one host")
    assert {port for _, port in connects} <= {server.port}


def test_a_redirect_loop_ends(server, remote):
    assert_fails(server, remote, redirect("/a.tar"), StorageError, "302 Found")
    assert server.count("/a.tar") < 10


@pytest.mark.parametrize("address", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1%eth0", "fd00:ec2::254"])
def test_addresses_of_credential_services_are_never_asked(address):
    with pytest.raises(ForbiddenAddress, match="refused"):
        check_address(address)


def test_a_name_that_leads_to_a_link_local_address_is_refused(remote, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]
    monkeypatch.setattr("mim.data.remote.socket.getaddrinfo", lambda *_args, **_options: found)
    with pytest.raises(StorageError, match=r"innocent\.example/a\.tar: it leads to the link-local address"):
        remote.pread("http://innocent.example/a.tar", 0, 1)


def test_compressed_answers_are_refused(server, remote):
    zipped = Fault("gzip", status=200, headers={"Content-Encoding": "gzip"})
    assert_fails(server, remote, zipped, StorageError, "compressed")


def test_a_copy_in_another_process_opens_its_own_connections_and_keeps_the_identity(server, remote):
    url = server.put("/a.tar", BODY)
    remote.pread(url, 0, 10)
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.pread(url, 7, 10) == BODY[7:17]
    server.put("/a.tar", BODY, etag='"2"')
    with pytest.raises(DataError, match="was overwritten"):
        copy.pread(url, 0, 10)


def test_a_forked_process_does_not_speak_on_its_parents_connection(server, remote):
    url = server.put("/a.tar", BODY)
    remote.pread(url, 0, 10)
    if (child := os.fork()) == 0:
        os._exit(0 if all(remote.pread(url, i, 100) == BODY[i : i + 100] for i in range(50)) else 1)
    for i in range(50):
        assert remote.pread(url, i, 100) == BODY[i : i + 100]
    assert os.waitpid(child, 0)[1] == 0


def test_waiting_does_not_advance_the_generators_of_the_run(server, remote):
    random.seed(7)
    state = random.getstate()
    assert_recovers(server, remote, [status(503)])
    assert random.getstate() == state


@pytest.fixture
def certificate(tmp_path):
    """The file of a certificate for 127.0.0.1 that nobody signed but itself, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    signed = made.add_extension(address, critical=False).sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = tmp_path / "certificate.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(signed.public_bytes(pem) + key.private_bytes(pem, *form))
    return path


def test_https_is_read_when_the_certificate_is_trusted_and_refused_when_not(certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with FaultServer(tls=context) as server:
        url = server.put("/a.tar", BODY, faults=[None, cut(50_000), stall(10)])
        with pytest.raises(StorageError, match=r"/a\.tar: .*certificate"):
            Remote(HASTE).pread(url, 0, 10)
        assert server.count("/a.tar") == 0
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        remote = Remote(HASTE)
        assert remote.pread(url, 0, 100_000) == BODY[:100_000]
        assert remote.pread(url, 100, 200_000) == BODY[100:200_100]
        assert server.fired["/a.tar"] == ["cut", "stall"]
        remote.close()


def plant_s3(monkeypatch, endpoint_url):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint_url)


def test_an_s3_address_is_presigned_anew_and_never_shown(server, remote, monkeypatch):
    pytest.importorskip("botocore")
    plant_s3(monkeypatch, server.url(""))
    server.put("/bucket/a.tar", BODY, then=None)
    assert remote.pread("s3://bucket/a.tar", 9, 10) == BODY[9:19]
    assert "X-Amz-Signature=" in server.requests["/bucket/a.tar"][0]["target"]
    server.put("/bucket/a.tar", BODY, then=status(403))
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/a\.tar: the server answers 403") as raised:
        remote.pread("s3://bucket/a.tar", 9, 10)
    assert_no_secret(raised.value)


@pytest.mark.slow
def test_an_s3_server_is_read_by_ranges_and_its_errors_are_one_sentence(remote, monkeypatch):
    servers, botocore = pytest.importorskip("moto.server"), pytest.importorskip("botocore.session")
    moto = servers.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        plant_s3(monkeypatch, "http://{}:{}".format(*moto.get_host_and_port()))
        client = botocore.get_session().create_client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="photos")
        client.put_object(Bucket="photos", Key="train/a 1+ü.tar", Body=BODY)
        url = "s3://photos/train/a 1+ü.tar"
        assert remote.identify(url).size == len(BODY)
        assert [remote.pread(url, at, 1000) for at in (0, 123_456)] == [BODY[:1000], BODY[123_456:124_456]]
        with pytest.raises(DataError, match="ends at byte 300000"):
            remote.pread(url, 299_000, 2000)
        for missing in ("s3://photos/none.tar", "s3://none/a.tar"):
            with pytest.raises(StorageError, match=rf"cannot read {missing}: the server answers 404") as raised:
                remote.pread(missing, 0, 1)
            assert_no_secret(raised.value)
        client.put_object(Bucket="photos", Key="train/a 1+ü.tar", Body=BODY[::-1])
        with pytest.raises(DataError, match="was overwritten"):
            remote.pread(url, 0, 1000)
    finally:
        moto.stop()


def test_a_bucket_of_another_region_is_named(server, remote, monkeypatch):
    pytest.importorskip("botocore")
    plant_s3(monkeypatch, server.url(""))
    server.put("/bucket/a.tar", BODY, then=status(301, **{"x-amz-bucket-region": "eu-west-1"}))
    with pytest.raises(StorageError, match=r"301 Moved Permanently; .* set AWS_DEFAULT_REGION=eu-west-1"):
        remote.pread("s3://bucket/a.tar", 0, 1)


@pytest.mark.parametrize(
    ("code", "word", "remedy"),
    [
        (403, "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "does not belong to the access key"),
        (400, "ExpiredToken", "have expired, renew them"),
        (403, "AccessDenied", "check the credentials and their rights"),
    ],
)
def test_what_is_wrong_with_s3_credentials_is_told_at_once_in_the_servers_word(server, remote, code, word, remedy):
    body = f"<Error><Code>{word}</Code><AWSAccessKeyId>AKIAPLANTED</AWSAccessKeyId></Error>".encode()
    assert_fails(server, remote, status(code, body=body), StorageError, f"{code} .*{word}.*; .*{remedy}")
    assert server.fired["/a.tar"] == [f"status {code}"]


def test_missing_s3_credentials_are_one_sentence(remote, monkeypatch, tmp_path):
    pytest.importorskip("botocore")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"cannot sign the request for s3://bucket/a\.tar .*set AWS credentials"):
        remote.pread("s3://bucket/a.tar", 0, 1)


def test_a_hub_address_sends_the_token_to_the_hub_alone(server, remote, monkeypatch):
    monkeypatch.setattr(endpoint, "HUGGING_FACE", server.url(""))
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    path = "/datasets/me/photos/resolve/v1/train/a.tar"
    server.put(path, BODY)
    assert remote.pread("hf://datasets/me/photos@v1/train/a.tar", 9, 10) == BODY[9:19]
    assert server.requests[path][0]["Authorization"] == "Bearer hf_planted"
    server.put(path, b"", then=redirect("https://evil.example/a.tar"))
    with pytest.raises(StorageError, match="redirects to https://evil") as raised:
        remote.pread("hf://datasets/me/photos@v1/train/a.tar", 9, 10)
    assert_no_secret(raised.value)


def test_the_hub_may_redirect_to_its_own_hosts_which_do_not_get_the_token(certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setattr(endpoint, "HUGGING_FACE_CDN", ("127.0.0.1",))
    with FaultServer(tls=context) as hub, FaultServer(tls=context) as cdn:
        monkeypatch.setattr(endpoint, "HUGGING_FACE", hub.url(""))
        path = "/datasets/me/photos/resolve/main/a.tar"
        hub.put(path, b"", then=redirect(cdn.put("/blob", BODY, etag='"c"', faults=[cut(10_000)]) + "?Signature=x"))
        remote = Remote(HASTE)
        assert remote.pread("hf://datasets/me/photos/a.tar", 9, 50_000) == BODY[9:50_009]
        assert hub.requests[path][0]["Authorization"] == "Bearer hf_planted"
        assert (cdn.fired["/blob"], cdn.count("/blob")) == (["cut"], 2)
        assert not [request for request in cdn.requests["/blob"] if "Authorization" in request]
        cdn.put("/blob", BODY, etag='"d"')
        with pytest.raises(DataError, match=r"hf://datasets/me/photos/a\.tar was overwritten"):
            remote.pread("hf://datasets/me/photos/a.tar", 9, 10)


def test_a_google_address_sends_a_bearer_token_and_hides_it(server, remote, monkeypatch):
    auth = pytest.importorskip("google.auth")
    credentials = pytest.importorskip("google.oauth2.credentials").Credentials("ya29.planted")
    monkeypatch.setattr(auth, "default", lambda scopes: (credentials, None))
    monkeypatch.setattr(endpoint, "GOOGLE", server.url(""))
    server.put("/bucket/a.tar", BODY, faults=[None, status(403)])
    assert remote.pread("gs://bucket/a.tar", 9, 10) == BODY[9:19]
    assert server.requests["/bucket/a.tar"][0]["Authorization"] == "Bearer ya29.planted"
    with pytest.raises(StorageError, match=r"gs://bucket/a\.tar: the server answers 403") as raised:
        remote.pread("gs://bucket/a.tar", 9, 10)
    assert_no_secret(raised.value)


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/", "hf://datasets/me", "hf://spaces/me/x/a.tar"])
def test_an_address_without_an_object_is_refused(remote, url):
    with pytest.raises(ConfigError, match=r"names no object|is no file of a hub"):
        remote.pread(url, 0, 1)


def test_no_read_of_any_kind_starts_a_process(server, remote, monkeypatch):
    started = []
    events = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
    sys.addaudithook(lambda event, args: started.append(event) if event in events else None)
    monkeypatch.setenv("GOPEN_REWRITE", "http://=pipe:true ")
    assert_recovers(server, remote, [cut(10), status(503), stall(10)])
    assert started == []
    subprocess.run(["true"], check=True)  # the hook hears
    assert started


def test_a_path_is_sent_percent_encoded(server, remote):
    server.put("/a%20%C3%BC.tar", BODY)
    assert remote.pread(server.url("/a ü.tar"), 0, 9) == remote.pread(server.url("/a%20%C3%BC.tar"), 0, 9) == BODY[:9]
