"""The scripts for clusters, with `gcloud`, `srun` and `scontrol` played by a file of commands."""

import os
import pathlib
import shlex
import shutil
import string
import subprocess
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"

# Notes its arguments, then says the next line of the file that belongs to the question.
FAKE = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$FAKE/calls"
case "$*" in
  *queued-resources\ list*) answers=states ;;
  *tpu_worker.sh\ status*) answers=statuses ;;
  *) answers="of_$(basename "$0")" ;;
esac
[ -s "$FAKE/$answers" ] || exit 0
answer="$(head -n 1 "$FAKE/$answers")"
sed -i 1d "$FAKE/$answers"
[ "$answers" != of_srun ] || exit "$answer"
[ "$answer" = - ] || echo "$answer"
"""


@pytest.fixture
def fake(tmp_path):
    """Puts commands on the path, with what they are to answer; "-" is an empty line."""
    folder = tmp_path / "fake"
    folder.mkdir()

    def make(commands=("gcloud",), **answers):
        for name in commands:
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        for name, lines in answers.items():
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
        return folder

    return make


def run(script, *arguments, fake, **environment):
    path = f"{fake}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "PATH": path, "FAKE": str(fake), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = fake / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


SLICE = ("--name=mister", "--zone=us-west4-a")
MADE = (*SLICE, "--accelerator=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite", "--poll=0")
COMMAND = ("python", "-m", "launch.train", "--workdir=gs://my bucket/run")


def tpu_vm(fake, *options):
    return run(LAUNCH / "tpu_vm.sh", *MADE, *options, "--", *COMMAND, fake=fake)


def kinds(calls):
    """What each call of gcloud does, in one word; the looks left out."""
    words = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "tpu-vm scp": "copy",
        "tpu_worker.sh install": "install",
        "tpu_worker.sh start": "start",
        "tpu_worker.sh follow": "follow",
    }
    found = (next((word for text, word in words.items() if text in call), "") for call in calls)
    return [word for word in found if word]


def test_a_dry_run_prints_every_command_and_runs_none(fake):
    done, calls = tpu_vm(fake(), "--dry-run", "--spot", "--project=mine", "--delete")
    assert done.returncode == 0, done.stderr
    assert not calls
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    kept = ["create", "copy", "install", "start", "follow", "delete"]
    assert kinds([" ".join(words) for words in printed]) == kept
    create = next(words for words in printed if "create" in words)
    assert {"--spot", "--project=mine", "--accelerator-type=v5litepod-16"} <= set(create)
    start = next(words[-1] for words in printed if "tpu_worker.sh start" in words[-1])
    assert shlex.split(start)[-len(COMMAND) :] == list(COMMAND)  # what the worker's shell reads


def test_a_slice_that_is_taken_away_is_made_anew_and_the_command_resumes(fake):
    folder = fake(states=["-", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "-", "ACTIVE"])
    (folder / "statuses").write_text("-\n-\n-\n0\n")  # none, no word, none on the new one, done
    done, calls = tpu_vm(folder)
    assert done.returncode == 0, done.stderr
    once = ["copy", "install", "start", "follow"]
    assert kinds(calls) == ["create", *once, "delete", "create", *once]
    starts = [call for call in calls if "tpu_worker.sh start" in call]
    assert starts[0] == starts[1] and "gs://my\\ bucket/run" in starts[0]


def test_a_command_that_runs_already_is_shown_and_not_started(fake):
    done, calls = tpu_vm(fake(states=["ACTIVE"], statuses=["running", "0"]))
    assert done.returncode == 0, done.stderr
    assert kinds(calls) == ["follow"]


@pytest.mark.parametrize(
    ("statuses", "starts", "status"),
    [
        (["-", "2"], 1, 2),
        (["-", "1", "1", "0"], 2, 0),
        (["-", "1", "1", "1", "1", "134"], 3, 134),
        (["-", "143", "143", "143", "143", "143", "143", "0"], 4, 0),
    ],
)
def test_failures_are_tried_again_but_not_for_ever(fake, statuses, starts, status):
    folder = fake(states=["ACTIVE"] * 9, statuses=statuses)
    done, calls = tpu_vm(folder, "--max_restarts=2")
    assert done.returncode == status, done.stderr
    assert kinds(calls).count("start") == starts


def test_deleting_needs_no_command(fake):
    done, calls = run(LAUNCH / "tpu_vm.sh", *SLICE, "--delete", fake=fake())
    assert done.returncode == 0, done.stderr
    assert kinds(calls) == ["delete"] and "--force" in calls[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name=mister",), "--name and --zone are needed"),
        (SLICE, "no command"),
        ((*SLICE, "--", "python"), "--accelerator and --runtime are needed"),
        ((*SLICE, "--sopt", "--", "python"), "--sopt: unknown"),
    ],
)
def test_a_wrong_call_ends_with_one_line(fake, arguments, message):
    done, calls = run(LAUNCH / "tpu_vm.sh", *arguments, fake=fake())
    assert (done.returncode, calls) == (2, [])
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def tree(tmp_path):
    """The repository as on a worker that is installed."""
    launch = tmp_path / "mister_jax" / "launch"
    launch.mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_worker.sh", launch)
    for sourced in ("install.sh", "malloc.sh"):
        (launch / sourced).write_text("")
    return launch.parent


def worker(tree, *arguments):
    command = ["bash", str(tree / "launch" / "tpu_worker.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_worker_keeps_a_command_and_its_status(tree):
    assert worker(tree, "status") == ""
    worker(tree, "start", "bash", "-c", "echo 'one two'; exit 3")
    assert worker(tree, "follow") == "one two\n"
    assert worker(tree, "status") == "3\n"


def test_a_worker_lets_a_command_save_before_it_stops(tree):
    saves = "trap 'echo saved; exit 143' TERM; echo ready; while true; do sleep 0.1; done"
    worker(tree, "start", "bash", "-c", saves)
    while "ready" not in (tree / ".run" / "log").read_text():
        time.sleep(0.05)
    assert worker(tree, "status") == "running\n"
    worker(tree, "stop")
    assert worker(tree, "status") == "143\n"
    assert worker(tree, "follow").endswith("saved\n")


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (143, 9, True), (134, 0, True), (134, 5, False)],
)
def test_slurm_queues_again_what_may_still_succeed(fake, tmp_path, status, restarts, requeued):
    (tmp_path / "launch").mkdir()
    for sourced in ("install.sh", "malloc.sh"):
        (tmp_path / "launch" / sourced).write_text("")
    folder = fake(("srun", "scontrol"), of_srun=[str(status)])
    done, calls = run(
        LAUNCH / "slurm.sbatch",
        *COMMAND,
        fake=folder,
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_NTASKS_PER_NODE="8",
        SLURM_GPUS_ON_NODE="8",
        SLURM_RESTART_COUNT=str(restarts),
        SLURM_JOB_ID="77",
    )
    assert calls[0].endswith(" ".join(COMMAND))
    assert calls[1:] == (["scontrol requeue 77"] if requeued else [])
    assert done.returncode == (0 if requeued else status)


@pytest.mark.parametrize(
    ("command", "gpus", "message"), [((), "8", "no command"), (COMMAND, "4", "8 tasks and 4 GPUs")]
)
def test_slurm_refuses_a_job_that_cannot_work(fake, command, gpus, message):
    given = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": gpus}
    done, calls = run(LAUNCH / "slurm.sbatch", *command, fake=fake(("srun",)), **given)
    assert (done.returncode, calls) == (2, [])
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_the_jobset_puts_the_command_on_every_host():
    values = {
        "NAME": "mister", "IMAGE": "image", "COMMAND": "python -m launch.train\n  --distributed",
        "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS": "4",
        "MAX_RESTARTS": "20",
    }  # fmt: skip
    text = (LAUNCH / "gke.yaml").read_text()
    body = text[text.index("apiVersion") :]
    jobset = yaml.safe_load(string.Template(body).substitute(values))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["restartPolicy"] == "Never"  # as a failure policy of pods asks
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["command"] == ["bash", "-c", "exec python -m launch.train --distributed"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
