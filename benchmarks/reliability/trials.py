"""A reader in a process of its own, under a time limit, with all that it does recorded.

A server process imports torch, webdataset and mim once and forks a child per rank and trial, so that a trial costs
milliseconds and can neither spoil the next one nor hang it. A child leads a process group of its own: what it leaves
behind is seen and ended.

    python -m benchmarks.reliability.trials     the server: a trial per line of stdin, a result per line of stdout
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.fixtures import Row

ROOT = Path(__file__).parents[2]
LIMIT = 30.0  # seconds for a trial, unless it says otherwise
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")
NEW_MOUNTS, PRIVATE_MOUNTS = 0x20000, 0x44000  # CLONE_NEWNS; MS_REC | MS_PRIVATE


@dataclass
class Result:
    """What one rank did."""

    exit: int | None = None  # None: it was ended by the limit or by a signal
    message: str = ""  # of the error that ended it
    output: str = ""  # stdout and stderr
    batches: list[list[Row]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)  # of each batch
    events: list[list[str]] = field(default_factory=list)  # audit events of WATCHED, of the rank and its workers
    grown: int = 0  # bytes of resident memory beyond those at the start, at the peak
    read: int = 0  # bytes read from files by the rank itself
    hung: bool = False
    orphans: bool = False  # processes were left behind

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.batches for row in batch]

    @property
    def text(self) -> str:
        """All that a user could have seen."""
        return f"{self.message}\n{self.output}"

    def started(self) -> list[str]:
        """Programs that were started."""
        return [json.dumps(event) for event in self.events if event[0].startswith(("subprocess", "os."))]


class Trials:
    """The client: `run` starts readers and returns what each rank did."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.server: subprocess.Popen[str] | None = None

    def run(
        self,
        reader: str,
        *,
        limit: float = LIMIT,
        processes: int = 1,
        each: Sequence[dict[str, Any]] = (),
        **options: Any,
    ) -> list[Result]:
        """Run a reader of `benchmarks.reliability.readers` in `processes` processes; ranks count from 0.

        each: options of each process, where they are not the same.
        """
        each = each or [{}] * processes
        out = self.folder / f"trial-{self.count:05d}"
        out.mkdir(parents=True)
        self.count += 1
        trial = {"reader": reader, "limit": limit, "each": list(each), "out": str(out), "port": free_port()}
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(trial | options) + "\n")
        server.stdin.flush()
        states = json.loads(server.stdout.readline())
        return [_result(out, rank, **state) for rank, state in enumerate(states)]

    def run_each(self, reader: str, target: Path, contents: Sequence[bytes], **options: Any) -> list[Result]:
        """Run a reader once with each of several contents of a file, in one process as long as none hangs."""
        variants = []
        for number, content in enumerate(contents):
            variant = self.folder / f"variants-{self.count:05d}" / str(number)
            variant.parent.mkdir(parents=True, exist_ok=True)
            variant.write_bytes(content)
            variants.append(str(variant))
        found: list[Result] = []
        while len(found) < len(variants):
            left = variants[len(found) :]
            limit = LIMIT + len(left)
            (whole,) = self.run(reader, limit=limit, variants=left, target=str(target), **options)
            ends = self.folder / f"trial-{self.count - 1:05d}" / "each-0.jsonl"
            for line in ends.read_text().splitlines() if ends.exists() else []:
                end = json.loads(line)
                end["batches"] = [[tuple(row) for row in batch] for batch in end["batches"]]
                found.append(Result(**end))
            if len(found) < len(variants):  # the next one hung, or took the process with it
                found.append(Result(hung=whole.hung, message=whole.text))
        return found

    def _started(self) -> subprocess.Popen[str]:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.reliability.trials"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
            )
        return self.server

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            assert self.server.stdin is not None
            self.server.stdin.close()
            self.server.wait()


def _result(out: Path, rank: int, *, hung: bool, orphans: bool) -> Result:
    found = Result(hung=hung, orphans=orphans)
    end = out / f"end-{rank}.json"
    if end.exists():
        for name, value in json.loads(end.read_bytes()).items():
            setattr(found, name, value)
    found.output = (out / f"output-{rank}.txt").read_text(errors="replace")
    for line in (out / f"rows-{rank}.jsonl").read_text().splitlines():
        rows, facts = json.loads(line)
        found.batches.append([tuple(row) for row in rows])
        found.facts.append(facts)
    found.events = [json.loads(line) for line in (out / f"events-{rank}.jsonl").read_text().splitlines()]
    return found


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ---- the server ----------------------------------------------------------------------------------


def serve() -> None:
    """Answer trials until stdin ends."""
    import torch

    from benchmarks.reliability import readers

    torch.set_num_threads(1)
    readers.warm_up()
    gc.freeze()  # children share what is there instead of copying it when they collect
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        trial = json.loads(line)
        children = []
        for rank in range(len(trial["each"])):
            for name in ("output", "rows", "events"):
                Path(trial["out"], f"{name}-{rank}.{'txt' if name == 'output' else 'jsonl'}").touch()
            pid = os.fork()
            if pid == 0:
                _child(trial | trial["each"][rank], rank, readers)
            children.append(pid)
        answers.write(json.dumps(_watch(children, trial["limit"], trial.get("grace"))) + "\n")
        answers.flush()


def _watch(children: list[int], limit: float, grace: float | None) -> list[dict[str, bool]]:
    """Wait for all children, end those that pass the limit, and what they leave behind.

    grace: seconds that the others have when one has failed, as launchers of several ranks give them.
    """
    deadline = time.monotonic() + limit
    waiting = set(children)
    while waiting and time.monotonic() < deadline:
        for pid in list(waiting):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                waiting.discard(pid)
                if status and grace is not None:
                    deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.002)
    states = []
    for pid in children:
        hung = pid in waiting
        left = _end_group(pid)
        if hung:
            os.waitpid(pid, 0)
        states.append({"hung": hung, "orphans": left and not hung})
    return states


def _end_group(leader: int) -> bool:
    """End a process group; return whether anything of it was alive. Ending processes get a moment to be gone."""
    for _ in range(50):
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return False
        if (Path("/proc") / str(leader)).exists():  # the leader itself has not ended: nothing to wait for
            break
        time.sleep(0.01)
    os.killpg(leader, signal.SIGKILL)
    return True


def _child(trial: dict[str, Any], rank: int, readers: Any) -> None:
    """Run one rank; never returns."""
    code, message = 1, ""
    try:
        os.setpgid(0, 0)
        os.environ |= trial.get("env", {})
        out = Path(trial["out"])
        log = os.open(out / f"output-{rank}.txt", os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        rows = (out / f"rows-{rank}.jsonl").open("a")
        events = os.open(out / f"events-{rank}.jsonl", os.O_WRONLY | os.O_APPEND)  # shared with loader processes

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in WATCHED:
                shown = [argument if isinstance(argument, str) else repr(argument) for argument in arguments]
                os.write(events, (json.dumps([event, *shown]) + "\n").encode())

        def emit(batch: list[Row], facts: dict[str, Any]) -> None:
            rows.write(json.dumps([batch, facts]) + "\n")
            rows.flush()

        if small := confine(trial):
            os.write(events, (json.dumps(small) + "\n").encode())
        sys.addaudithook(audit)
        resident, before = _peak(), _bytes_read()
        if "variants" in trial:
            _read_each(trial, rank, readers)
        else:
            code, message = readers.read(trial, rank, emit)
        end = {"exit": code, "message": message, "grown": _peak() - resident, "read": _bytes_read() - before}
        (out / f"end-{rank}.json").write_text(json.dumps(end))
    except BaseException:
        traceback.print_exc()
    finally:
        gc.collect()  # a program that ends lets go of its readers,
        atexit._run_exitfuncs()  # and ends its loader processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def confine(trial: dict[str, Any]) -> list[str]:
    """Give this process, and what it starts, the small disk of a trial; return what it got as an event.

    file_limit   bytes that no file can exceed: a disk that becomes full while something is written (EFBIG)
    disk         [folder, bytes]: a file system of this size is mounted there, for this process alone (ENOSPC)
    """
    if "file_limit" in trial:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial["file_limit"],) * 2)
        return ["file limit", str(trial["file_limit"])]
    if "disk" in trial:
        libc, (folder, size) = ctypes.CDLL(None, use_errno=True), trial["disk"]
        options = f"size={size},mode=700".encode()
        done = (
            libc.unshare(NEW_MOUNTS) == 0
            and libc.mount(b"none", b"/", None, PRIVATE_MOUNTS, None) == 0
            and libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, options) == 0
        )
        return ["disk", str(size)] if done else ["no disk", os.strerror(ctypes.get_errno())]
    return []


def _read_each(trial: dict[str, Any], rank: int, readers: Any) -> None:
    """Read once with each of several contents of a file, and write a line for each as soon as it ended."""
    with Path(trial["out"], f"each-{rank}.jsonl").open("a") as ends:
        for variant in trial["variants"]:
            shutil.copyfile(variant, trial["target"])
            batches: list[list[Row]] = []
            code, message = readers.read(trial, rank, lambda rows, _facts, found=batches: found.append(rows))
            ends.write(json.dumps({"exit": code, "message": message, "batches": batches}) + "\n")
            ends.flush()


def _peak() -> int:
    """Peak resident bytes of this process, or of its largest child."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for everything that a bench writes."""
    return tempfile.TemporaryDirectory(prefix="mimstream-reliability-")


if __name__ == "__main__":
    serve()
    os._exit(0)  # nothing is left to do; taking torch down would take seconds
