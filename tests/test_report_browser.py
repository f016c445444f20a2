"""The report in a browser: headless Chromium opens the file, complains of nothing and asks for nothing."""

import json
import re
import shutil
import subprocess

import pytest

from mim.report.page import page
from tests.written_run import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-dev-shm-usage", "--enable-logging=stderr", "--virtual-time-budget=2000",
)  # fmt: skip
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


def opened(file):
    """What a page said on the console, the addresses that it asked for, and the document that it became."""
    log = file.with_suffix(".net.json")
    folder = file.with_suffix(".profile")
    command = [CHROMIUM, *OPTIONS, f"--log-net-log={log}", f"--user-data-dir={folder}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    kinds = json.loads(log.read_text())
    start = kinds["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [
        event["params"] for event in kinds["events"] if event["type"] == start and "url" in event.get("params", {})
    ]
    urls = [one["url"] for one in asked if one.get("initiator") != "not an origin"]  # those are the browser's own
    console = re.findall(r"CONSOLE.*", done.stderr)
    return console, [url for url in urls if not url.startswith(("data:", "file:"))], done.stdout


def test_the_page_opens_without_an_error_or_a_request_and_nothing_else_runs_in_it(tmp_path):
    text = page([write_run(tmp_path / "mae", steps=2000, log_every=20)])
    file = tmp_path / "report.html"
    file.write_text(text)
    console, asked, document = opened(file)
    assert (console, asked) == ([], [])
    assert document.count("data-chart=") > 5
    evil = "<script>document.title = 'taken'; console.error('ran')</script></main>"
    file.write_text(text.replace("</main>", evil))
    console, _, document = opened(file)
    assert any("Content Security Policy" in line for line in console)  # so a complaint would have been seen above
    assert "<title>taken" not in document
