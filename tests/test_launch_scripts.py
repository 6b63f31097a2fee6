"""Cluster scripts, with a fake `gcloud`, `srun` and `scontrol` that read answers from files."""

import json
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

# This script logs its arguments, then prints the next answer from the file for this kind of call.
# Under the name `srun`, the script exits with the answer as its status instead. Under the name
# `git`, it lists one file.
FAKE_COMMAND = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$FAKE/calls"
case "$*" in
  *queued-resources\ list*) answers=states ;;
  *tpu_worker.sh\ status*) answers=statuses ;;
  *tpu_worker.sh\ install*) answers=installations ;;
  ls-files*) printf 'setup.cfg\0'; exit ;;
  *) answers="of_$(basename "$0")" ;;
esac
[ -s "$FAKE/$answers" ] || exit 0
answer="$(head -n 1 "$FAKE/$answers")"
sed -i 1d "$FAKE/$answers"
[ "$answers" != of_srun ] || exit "$answer"
[ "$answer" != fail ] || { echo "fake failure" >&2; exit 1; }
[ "$answer" = - ] || echo "$answer"
"""


@pytest.fixture
def fake_commands(tmp_path):
    """Returns a function that writes fake commands and their answers to a folder.

    For the answer "-", a fake command prints nothing. For "fail", it fails.
    """
    folder = tmp_path / "fake"
    folder.mkdir()

    def make(commands=("gcloud", "git"), **answers):
        for name in commands:
            (folder / name).write_text(FAKE_COMMAND)
            (folder / name).chmod(0o755)
        for name, lines in answers.items():
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
        return folder

    return make


def run(script, *arguments, folder, cwd=None, **environment):
    """Runs a script with the fake commands; returns its result and the calls of the commands."""
    path = f"{folder}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "PATH": path, "FAKE": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=30,
        cwd=cwd,
    )
    calls = folder / "calls"
    return result, calls.read_text().splitlines() if calls.exists() else []


SLICE = ("--name=mister", "--zone=us-west4-a")
CREATE = (*SLICE, "--accelerator=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite", "--poll=0")
COMMAND = ("python", "-m", "launch.train", "--workdir=gs://my bucket/run")


def run_tpu_vm(folder, *options):
    return run(LAUNCH / "tpu_vm.sh", *CREATE, *options, "--", *COMMAND, folder=folder)


def actions(calls):
    """Returns a word for each gcloud call, except calls that read a state or stop the command."""
    words = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "tpu-vm scp": "copy",
        "tpu_worker.sh install": "install",
        "tpu_worker.sh start": "start",
        "tpu_worker.sh follow": "follow",
    }
    return [word for call in calls for text, word in words.items() if text in call]


def test_dry_run_prints_every_command_and_runs_none(fake_commands):
    result, calls = run_tpu_vm(fake_commands(), "--dry-run", "--spot", "--project=mine", "--delete")
    assert result.returncode == 0, result.stderr
    assert not calls
    printed = [shlex.split(line) for line in result.stdout.splitlines()]
    expected = ["create", "copy", "install", "start", "follow", "delete"]
    assert actions([" ".join(words) for words in printed]) == expected
    create = next(words for words in printed if "create" in words)
    assert {"--spot", "--project=mine", "--accelerator-type=v5litepod-16"} <= set(create)
    start = next(words[-1] for words in printed if "tpu_worker.sh start" in words[-1])
    assert shlex.split(start)[-len(COMMAND) :] == list(COMMAND)  # as the worker's shell parses it


def test_preempted_slice_is_created_again_and_the_command_restarts(fake_commands):
    folder = fake_commands(
        states=["-", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "-", "ACTIVE"],
        # Replies: no command yet, connection lost, no command on the new slice, finished.
        statuses=["-", "-", "-", "0"],
    )
    result, calls = run_tpu_vm(folder)
    assert result.returncode == 0, result.stderr
    once = ["copy", "install", "start", "follow"]
    assert actions(calls) == ["create", *once, "delete", "create", *once]
    starts = [call for call in calls if "tpu_worker.sh start" in call]
    assert starts[0] == starts[1] and "gs://my\\ bucket/run" in starts[0]


def test_failure_to_read_the_state_is_retried_during_a_wait(fake_commands):
    states = ["WAITING_FOR_RESOURCES", "fail", "fail", "WAITING_FOR_RESOURCES", "fail", "ACTIVE"]
    result, calls = run_tpu_vm(fake_commands(states=states, statuses=["running", "0"]))
    assert result.returncode == 0, result.stderr
    assert actions(calls) == ["follow"]
    assert result.stderr.count("retry 1 of 5") == 2 and "retry 2 of 5" in result.stderr


@pytest.mark.parametrize(
    ("states", "reads"), [(["fail", "ACTIVE"], 1), (["PROVISIONING", *["fail"] * 9], 7)]
)
def test_state_that_cannot_be_read_is_an_error(fake_commands, states, reads):
    result, calls = run_tpu_vm(fake_commands(states=states))
    assert result.returncode == 2
    error = "error: mister: gcloud cannot read the state of the queued resource"
    assert result.stderr.splitlines()[-1] == error
    assert sum("queued-resources list" in call for call in calls) == reads
    assert not actions(calls)


def test_the_state_is_read_at_most_once_per_poll(fake_commands):
    # The slice is still absent after it was created, and still suspended after it was deleted.
    folder = fake_commands(
        ("gcloud", "git", "sleep"),
        states=["-", "-", "SUSPENDED", "SUSPENDED", "FAILED", "fail", "ACTIVE", "ACTIVE"],
        statuses=["fail", "running", "0"],
    )
    result, calls = run_tpu_vm(folder, "--poll=7")
    assert result.returncode == 0, result.stderr
    assert actions(calls) == ["create"] * 2 + ["delete"] * 3 + ["follow"]
    assert calls.count("sleep 7") == 7  # after six states and the failed status


def test_command_on_an_unreachable_worker_is_not_stopped(fake_commands):
    folder = fake_commands(
        states=["ACTIVE"] * 5, statuses=["fail", "running", "fail", "running", "0"]
    )
    result, calls = run_tpu_vm(folder)
    assert result.returncode == 0, result.stderr
    assert actions(calls) == ["follow"] * 2
    assert "worker 0 cannot be reached" in result.stderr


def test_installation_is_retried_and_gives_up_if_it_always_fails(fake_commands):
    folder = fake_commands(
        states=["ACTIVE"] * 3, statuses=["-"] * 3 + ["0"], installations=["fail", "fail", "-"]
    )
    result, calls = run_tpu_vm(folder)
    assert result.returncode == 0, result.stderr
    once = ["copy", "install"]
    assert actions(calls) == [*once, *once, *once, "start", "follow"]
    assert "retry 2 of 5" in result.stderr

    folder = fake_commands(states=["ACTIVE"] * 9, installations=["fail"] * 9)
    result, _ = run_tpu_vm(folder)
    assert result.returncode == 2
    error = "error: mister: a worker cannot be reached, or its installation failed"
    assert result.stderr.splitlines()[-1].startswith(error)
    assert result.stderr.count("its installation failed; retry") == 5


def test_running_command_is_followed_and_not_restarted(fake_commands):
    result, calls = run_tpu_vm(fake_commands(states=["ACTIVE"], statuses=["running", "0"]))
    assert result.returncode == 0, result.stderr
    assert actions(calls) == ["follow"]


@pytest.mark.parametrize(
    ("statuses", "starts", "status"),
    [
        (["-", "2"], 1, 2),
        (["-", "1", "1", "0"], 2, 0),
        (["-", "1", "1", "1", "1", "134"], 3, 134),
        (["-", "143", "143", "143", "143", "143", "143", "0"], 4, 0),
    ],
)
def test_failed_command_restarts_at_most_max_restarts_times(
    fake_commands, statuses, starts, status
):
    folder = fake_commands(states=["ACTIVE"] * 9, statuses=statuses)
    result, calls = run_tpu_vm(folder, "--max_restarts=2")
    assert result.returncode == status, result.stderr
    assert actions(calls).count("start") == starts


def test_delete_needs_no_command(fake_commands):
    result, calls = run(LAUNCH / "tpu_vm.sh", *SLICE, "--delete", folder=fake_commands())
    assert result.returncode == 0, result.stderr
    assert actions(calls) == ["delete"] and "--force" in calls[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name=mister",), "--name and --zone are required"),
        (SLICE, "no command"),
        ((*SLICE, "--", "python"), "--accelerator and --runtime are required"),
        ((*SLICE, "--sopt", "--", "python"), "unknown option --sopt"),
        ((*CREATE, "--poll=1m", "--", "python"), "--poll must be a whole number of seconds"),
        ((*CREATE, "--max_restarts=x", "--", "python"), "--max_restarts must be a whole number"),
    ],
)
def test_invalid_arguments_exit_with_a_one_line_error(fake_commands, arguments, message):
    result, calls = run(LAUNCH / "tpu_vm.sh", *arguments, folder=fake_commands())
    assert (result.returncode, calls) == (2, [])
    assert message in result.stderr and result.stderr.count("\n") == 1


def only_tools(folder, *names):
    """Returns a PATH with only bash, dirname, these programs and the fake commands."""
    for name in ("bash", "dirname", *names):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.mark.parametrize(
    ("script", "arguments", "commands", "message"),
    [
        ("tpu_vm.sh", (*CREATE, "--", "python"), (), "gcloud is not installed"),
        ("tpu_vm.sh", (*SLICE, "--delete"), (), "gcloud is not installed"),
        ("tpu_vm.sh", (*CREATE, "--", "python"), ("gcloud",), "git is not installed"),
        ("meld_text.sh", ("CSV", "WORK"), (), "mister-jax is not installed"),
        ("demo.sh", (), (), "python3 not found; set PYTHON"),
    ],
)
def test_missing_tools_are_one_line_errors(fake_commands, script, arguments, commands, message):
    folder = fake_commands(commands)
    result, calls = run(LAUNCH / script, *arguments, folder=folder, PATH=only_tools(folder))
    assert (result.returncode, calls) == (2, [])
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_dry_run_needs_no_tools(fake_commands):
    folder = fake_commands(())
    path = only_tools(folder, "tail", "date", "rm")
    command = (*CREATE, "--dry-run", "--", "python")
    result, _ = run(LAUNCH / "tpu_vm.sh", *command, folder=folder, PATH=path)
    assert result.returncode == 0, result.stderr


def test_folder_without_git_is_an_error(fake_commands, tmp_path):
    (tmp_path / "launch").mkdir()
    script = shutil.copy(LAUNCH / "tpu_vm.sh", tmp_path / "launch")
    folder = fake_commands(("gcloud",))
    git = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "LC_ALL": "C"}
    result, calls = run(script, *CREATE, "--", "python", folder=folder, **git)
    assert (result.returncode, calls) == (2, [])
    assert "not a git repository" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("demo.sh", "launch/demo.sh [FOLDER]"),
        ("lint.sh", "launch/lint.sh [--fix]"),
        ("meld_text.sh", "launch/meld_text.sh CSV_FOLDER WORK [SEED...]"),
        ("slurm.sbatch", "sbatch --nodes=2"),
        ("test.sh", "launch/test.sh [--parity]"),
        ("tpu_vm.sh", "--max_restarts=10"),
        ("tpu_worker.sh", "tpu_worker.sh start COMMAND..."),
    ],
)
def test_help_prints_the_usage(fake_commands, script, words):
    folder = fake_commands(())
    path = only_tools(folder, "sed")
    result, _ = run(script, "--help", folder=folder, cwd=LAUNCH, PATH=path)
    assert (result.returncode, result.stderr) == (0, "")
    assert words in result.stdout
    assert "#" not in result.stdout and "set -e" not in result.stdout


@pytest.mark.parametrize("script", ["demo.sh", "lint.sh"])
def test_unknown_options_are_one_line_errors(fake_commands, script):
    folder = fake_commands(())
    result, _ = run(LAUNCH / script, "--fxi", folder=folder, PATH=only_tools(folder))
    assert result.returncode == 2
    assert "--fxi; see --help" in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture
def worker_repository(tmp_path):
    """The folder of the installed repository on a worker."""
    launch = tmp_path / "mister_jax" / "launch"
    launch.mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_worker.sh", launch)
    for sourced in ("install.sh", "malloc.sh"):
        (launch / sourced).write_text("")
    return launch.parent


def run_on_worker(repository, *arguments):
    command = ["bash", str(repository / "launch" / "tpu_worker.sh"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_worker_keeps_the_output_and_status_of_a_command(worker_repository):
    assert run_on_worker(worker_repository, "status") == ""
    run_on_worker(worker_repository, "start", "bash", "-c", "echo 'one two'; exit 3")
    assert run_on_worker(worker_repository, "follow") == "one two\n"
    assert run_on_worker(worker_repository, "status") == "3\n"


def test_stop_lets_a_command_save(worker_repository):
    saves = "trap 'echo saved; exit 143' TERM; echo ready; while true; do sleep 0.1; done"
    run_on_worker(worker_repository, "start", "bash", "-c", saves)
    while "ready" not in (worker_repository / ".run" / "log").read_text():
        time.sleep(0.05)
    assert run_on_worker(worker_repository, "status") == "running\n"
    run_on_worker(worker_repository, "stop")
    assert run_on_worker(worker_repository, "status") == "143\n"
    assert run_on_worker(worker_repository, "follow").endswith("saved\n")


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (143, 9, True), (134, 0, True), (134, 5, False)],
)
def test_slurm_requeues_what_may_still_succeed(fake_commands, tmp_path, status, restarts, requeued):
    (tmp_path / "launch").mkdir()
    for sourced in ("install.sh", "malloc.sh"):
        (tmp_path / "launch" / sourced).write_text("")
    folder = fake_commands(("srun", "scontrol"), of_srun=[str(status)])
    result, calls = run(
        LAUNCH / "slurm.sbatch",
        *COMMAND,
        folder=folder,
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_NTASKS_PER_NODE="8",
        SLURM_GPUS_ON_NODE="8",
        SLURM_RESTART_COUNT=str(restarts),
        SLURM_JOB_ID="77",
    )
    assert calls[0].endswith(" ".join(COMMAND))
    assert calls[1:] == (["scontrol requeue 77"] if requeued else [])
    assert result.returncode == (0 if requeued else status)


@pytest.mark.parametrize(
    ("command", "gpus", "message"),
    [((), "8", "no command"), (COMMAND, "4", "8 tasks and 4 GPUs per node")],
)
def test_slurm_refuses_a_job_that_cannot_work(fake_commands, command, gpus, message):
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": gpus,
    }  # fmt: skip
    folder = fake_commands(("srun",))
    result, calls = run(LAUNCH / "slurm.sbatch", *command, folder=folder, **slurm)
    assert (result.returncode, calls) == (2, [])
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_slurm_script_outside_a_job_or_the_repository_is_an_error(fake_commands, tmp_path):
    folder = fake_commands(("srun",))
    outside, _ = run(LAUNCH / "slurm.sbatch", *COMMAND, folder=folder, SLURM_JOB_ID="")
    assert outside.returncode == 2
    assert "sbatch [OPTION...] launch/slurm.sbatch" in outside.stderr
    assert outside.stderr.count("\n") == 1
    slurm = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"}
    elsewhere, calls = run(
        LAUNCH / "slurm.sbatch", *COMMAND, folder=folder, SLURM_SUBMIT_DIR=str(tmp_path), **slurm
    )
    assert (elsewhere.returncode, calls) == (2, [])
    assert f"not in {tmp_path}" in elsewhere.stderr and elsewhere.stderr.count("\n") == 1


def test_gke_jobset_runs_the_command_on_every_host():
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
    assert pod["restartPolicy"] == "Never"  # required by a pod failure policy
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["command"] == ["bash", "-c", "exec python -m launch.train --distributed"]
    assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_seed_with_the_best_validation_score_becomes_meld_text(fake_commands, tmp_path):
    folder = fake_commands(("mister-jax",))
    work = tmp_path / "work"
    # The seed with the best test score is not the seed with the best validation score.
    for seed, validation, test in ((0, 0.5, 0.7), (1, 0.6, 0.5), (2, 0.55, 0.8)):
        scores = {"validation": {"weighted_f1": validation}, "test": {"weighted_f1": test}}
        (work / f"run_{seed}").mkdir(parents=True)
        (work / f"run_{seed}" / "metrics.json").write_text(json.dumps(scores))
    result, calls = run(LAUNCH / "meld_text.sh", "CSV", str(work), folder=folder)
    assert result.returncode == 0, result.stderr
    assert (
        calls[-1] == f"mister-jax export --model={work}/run_1 --output={work}/meld-text --overwrite"
    )
    assert sum(" train " in call for call in calls) == 6
    (work / "run_0" / "metrics.json").unlink()
    incomplete, calls = run(LAUNCH / "meld_text.sh", "CSV", str(work), folder=folder)
    assert incomplete.returncode != 0 and " evaluate " in calls[-1]
    usage, _ = run(LAUNCH / "meld_text.sh", folder=folder)
    assert usage.returncode == 2 and "meld_text.sh CSV_FOLDER WORK [SEED...]" in usage.stderr
