"""`mim report --serve`: one page, to this machine alone."""

import http.client
import threading

import pytest

from mim.report.server import Viewer
from tests.written_run import write_run


@pytest.fixture
def viewer(tmp_path):
    """A viewer of a written run, which answers."""
    with Viewer([write_run(tmp_path / "mae", steps=100)], 0) as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield found
        found.shutdown()


def ask(viewer, method="GET", path="/", **headers):
    """The answer to a request: status, headers, content."""
    connection = http.client.HTTPConnection("127.0.0.1", viewer.server_port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_it_shows_the_page_and_tells_when_nothing_changed(viewer):
    status, headers, content = ask(viewer)
    assert status == 200
    assert b"data-live" in content
    assert ask(viewer, **{"If-None-Match": headers["ETag"]})[0] == 304
    with (viewer.runs[0] / "log.jsonl").open("a") as log:
        log.write('{"event": "train", "step": 101, "loss": 0.123456}\n')
    status, _, content = ask(viewer, **{"If-None-Match": headers["ETag"]})
    assert status == 200
    assert b"0.1235" in content


def test_a_run_that_fell_silent_is_told_without_a_change_of_its_files(viewer, monkeypatch):
    _, version = viewer.current()
    monkeypatch.setattr("mim.report.server.STALE", 1e-6)
    monkeypatch.setattr("mim.report.server.page", lambda runs, live: "silent for 2 h")
    assert viewer.current()[0] == b"silent for 2 h"
    assert viewer.current()[1] != version


def test_it_listens_on_this_machine_alone(viewer):
    assert viewer.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/config.yaml", "/../config.yaml", "/%2e%2e/etc/passwd", "/?a", "*"])
def test_there_is_no_other_page(viewer, path):
    assert ask(viewer, path=path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_is_read_only(viewer, method):
    assert ask(viewer, method=method)[0] == 501


def test_a_head_has_no_content(viewer):
    status, headers, content = ask(viewer, method="HEAD")
    assert (status, content) == (200, b"")
    assert int(headers["Content-Length"]) > 10_000


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "127.0.0.1:1"]
)
def test_a_request_under_another_name_is_refused(viewer, host):
    status, _, content = ask(viewer, Host=host.format(port=viewer.server_port))
    assert status == 403
    assert len(content) < 100
