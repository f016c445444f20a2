"""Group F, continued: locations that run programs, recipes that execute, and secrets that must stay where they are."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.bench import OURS, USUAL, Bench, Case, fired
from benchmarks.reliability.cases_hostile import unharmed
from benchmarks.reliability.serving import pair, pointed, put, serving
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import (
    LOUD,
    PASS,
    SILENT,
    SKIPPED,
    Verdict,
    delivered,
    ended,
    joined,
    leaked,
    refused,
)
from mim.data.shards import LOCK
from tests.fault_server import redirect

SECRETS = {  # planted words by the door through which they come in
    "user": "planted-password-1",
    "query": "planted-signature-2",
    "HF_TOKEN": "hf_planted3",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-4",
    "AWS_SESSION_TOKEN": "planted-session-5",
    "WANDB_API_KEY": "planted-tracker-6",
}


def locations(bench: Bench, reader: str) -> Verdict:
    """F5: `pipe:`, `file:`, `-` and others are refused without a process; so are redirects to other hosts and schemes;
    environment variables change nothing."""
    verdicts = []
    tar = bench.small.tars[0]
    for template in (
        "pipe:touch {canary}; cat {tar}",
        "-",
        "ftp://localhost/x.tar",
        "gopen://x.tar",
        "file://{tar}",
        "{tar}|",
    ):
        canary = bench.scratch().with_name("canary")
        location = template.format(canary=canary, tar=tar)
        results = bench.read_tars(reader, [location], limit=20)
        verdict = unharmed(results, canary) or refused(results)
        verdicts.append(verdict.of(template.split()[0]))
        if reader == OURS:
            verdicts.append(_planted_location(bench, location, canary))
    return joined([*verdicts, *_redirects(bench, reader), _environment(bench, reader)])


def _planted_location(bench: Bench, location: str, canary: Path) -> Verdict:
    """A lock that was changed to name such a location must be refused, too."""
    copy = bench.small.copy(bench.scratch())
    lock = json.loads((copy.path / LOCK).read_bytes())
    lock["shards"][0]["url"] = location
    (copy.path / LOCK).write_text(json.dumps(lock))
    copy.tars[0].unlink()
    results = bench.read(OURS, copy.path, limit=20)
    return unharmed(results, canary) or refused(results)


def _redirects(bench: Bench, reader: str) -> list[Verdict]:
    """A server that sends its readers elsewhere: nobody else is asked, no file is opened, no password is shown."""
    found = pair(bench)
    name = found.tars[0].name
    with serving(found) as server, serving(found) as other:
        targets = {
            "another host": other.url(f"/{name}"),
            "another host, with a password": other.url(f"/{name}", host=f"me:{SECRETS['user']}@localhost"),
            "another scheme": f"https://127.0.0.1:{server.port}/{name}",
            "a file": f"file://{found.tars[0]}",
            "a link-local address": f"http://169.254.169.254/{name}",
        }
        each = []
        for number, target in enumerate(targets.values()):
            urls = put(server, found, f"/{number}")
            server.put(f"/{number}/{name}", b"", then=redirect(target))
            each.append(pointed(bench, reader, found, urls))
        results = bench.trials.run(reader, each=each, batch_size=12, limit=20)
        fired(all(server.fired[f"/{number}/{name}"] for number in range(len(targets))), "the server did not redirect")
        verdicts = []
        for kind, result in zip(targets, results, strict=True):
            elsewhere = [event[-1] for event in result.events if event[0] == "socket.connect"]
            elsewhere = [address for address in elsewhere if str(server.port) not in address]
            followed = Verdict(SILENT, f"it asked {elsewhere[0]}") if elsewhere else None
            verdicts.append(
                (followed or leaked(SECRETS, [result]) or refused([result], name)).of(f"redirect to {kind}")
            )
        asked = sum(len(requests) for requests in other.requests.values())
        return [*verdicts, Verdict(SILENT if asked else PASS, f"the other host was asked {asked} times")]


def _environment(bench: Bench, reader: str) -> Verdict:
    """Variables that rewrite locations, name a cache or a rank: everything is delivered as without them."""
    canary = bench.scratch().with_name("canary")
    rewrite = f"{bench.small.path}=pipe:touch {canary}; cat {bench.small.path}"
    env = {
        "GOPEN_REWRITE": rewrite,
        "WDS_CACHE": str(canary.parent),
        "WDS_SEED": "1",
        "WORKER": "1",
        "NUM_WORKERS": "2",
    }
    results = bench.read(reader, bench.small.path, env=env)
    verdict = unharmed(results, canary) or delivered(results, bench.small.rows)
    return verdict.of("environment")


def recipes(bench: Bench, reader: str) -> Verdict:
    """F6: YAML that executes, unfolds, or is mistaken. Refused with the place; the environment is not read."""
    if reader == USUAL:
        return Verdict(SKIPPED, "the usual recipe has no configuration of its own")
    canary = bench.scratch().with_name("canary")
    plain = Path(__file__).parents[2] / "configs" / "mae_vittiny_cifar10.yaml"
    text = plain.read_text()
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    aliases += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    planted = {
        "python tag": (f"evil: !!python/object/apply:os.system ['touch {canary}']\n", ("evil", "python")),
        "alias bomb": (aliases, ("a9", "alias", "a0")),
        "duplicate key": ("train: {}\ntrain: {}\n", ("train", "duplicate")),
        "unknown key": ("optimm: {}\n", ("optimm",)),
        "interpolated environment": ("train: {run: '${oc.env:HF_TOKEN}'}\n", ("oc.env", "train")),
        "eval resolver": (f"train: {{run: '${{eval:\"__import__(1)\"}}{canary}'}}\n", ("eval", "train")),
        "_target_": (f"objective: {{_target_: os.system, command: 'touch {canary}'}}\n", ("objective", "_target_")),
    }
    verdicts = []
    for name, (lines, places) in planted.items():
        recipe = bench.scratch().with_suffix(".yaml")
        section = lines.partition(":")[0]
        kept = text.splitlines() if name == "duplicate key" else _without(text, section)
        recipe.write_text("\n".join(kept) + "\n" + lines)
        fired(recipe.read_text() != text, "the recipe is as it was")
        arguments = ("train", recipe, f"data.path={bench.small.path}", "--dry-run")
        result = bench.mim(*arguments, limit=60, env={"HF_TOKEN": SECRETS["HF_TOKEN"]})
        verdict = unharmed([result], canary) or _by_place(result, places)
        if SECRETS["HF_TOKEN"] in result.text:
            verdict = Verdict(SILENT, "the environment variable was printed")
        if result.grown > 1 << 29:
            verdict = Verdict(SILENT, f"{result.grown >> 20} MiB were taken")
        verdicts.append(verdict.of(name))
    return joined(verdicts)


def _without(text: str, section: str) -> list[str]:
    """The lines of a recipe without one of its sections."""
    kept, inside = [], False
    for line in text.splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            inside = line.startswith(f"{section}:")
        if not inside:
            kept.append(line)
    return kept


def _by_place(result: Result, places: tuple[str, ...]) -> Verdict:
    """Refused as a mistake of the user (exit code 2), naming one of the places."""
    verdicts = [refused([result], place) for place in places]
    best = min(verdicts, key=lambda verdict: verdict.kind != PASS)
    if best.kind == PASS and result.exit != 2:
        return Verdict(LOUD, f"exit code {result.exit}: {best.detail}")
    return best


def secrets(bench: Bench, reader: str) -> Verdict:
    """F7: six secrets, ten errors: none stands in the output, in a file that was written, or on a command line."""
    env = {name: value for name, value in SECRETS.items() if name.isupper()}
    fired(len(env) == 4, "the environment holds no secrets")
    with nothing_there() as server:
        user = f"http://me:{SECRETS['user']}@127.0.0.1:{server.server_port}/part-0.tar"
        query = f"http://127.0.0.1:{server.server_port}/part-0.tar?X-Amz-Signature={SECRETS['query']}"
        missing = f"http://127.0.0.1:{server.server_port}/part-0.tar"
        results = [bench.read_tars(reader, [url], env=env, limit=40)[0] for url in (user, query, missing)]
        written: list[Path] = []
        if reader == OURS:
            for url in (user, query, missing):
                copy = bench.small.copy(bench.scratch())
                lock = json.loads((copy.path / LOCK).read_bytes())
                lock["shards"][0]["url"] = url
                (copy.path / LOCK).write_text(json.dumps(lock))
                results += bench.read(OURS, copy.path, env=env, limit=40)
                results.append(bench.mim("shards", "verify", copy.path, "--workers", 1, env=env, limit=60))
            run = bench.scratch()
            for broken in (f"data.path={user}", f"data.path={bench.folder / 'nowhere'}"):
                results.append(bench.mim("train", "mae_vittiny_cifar10", broken, f"train.run={run}", env=env, limit=60))
            written = [file for file in run.parent.rglob("*") if file.is_file()]
        else:
            results += [
                bench.trials.run(USUAL, tars=[str(bench.folder / f"nowhere-{i}.tar")], env=env)[0] for i in range(7)
            ]
    fired(server.asked, "no reader asked the server")
    failed = sum(result.exit != 0 for result in results)
    fired(failed >= 10, f"only {failed} of {len(results)} runs ended with an error")
    if leak := leaked(SECRETS, results, written):
        return leak
    hung = next((ended([result]) for result in results if result.hung or result.orphans), None)
    return hung or Verdict(PASS, f"{failed} errors, nothing of 6 secrets")


class NothingThere(http.server.BaseHTTPRequestHandler):
    """Answers 404, and counts."""

    def do_GET(self) -> None:
        self.server.asked += 1  # type: ignore[attr-defined]
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def nothing_there() -> Iterator[Any]:
    """A web server that holds nothing."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NothingThere) as server:
        server.asked = 0  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


CASES = (
    Case("F5", "pipe:, file:, redirects, environment variables", locations),
    Case("F6", "recipes that execute, unfold or are mistaken", recipes),
    Case("F7", "six secrets through ten errors", secrets),
)
