"""Atomic writes of directories: a failed or killed writer leaves the old content."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from etils import epath

from mister_jax.data.storage import atomic_directory, recover_directory
from mister_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]

# This script replaces a directory and kills itself at the rename with the given number. Rename 1
# moves the old directory aside, and rename 2 moves the new directory into position.
KILLED_WRITER = """
import os, signal, sys
from etils import epath
from mister_jax.data.storage import atomic_directory

root, fatal_call = epath.Path(sys.argv[1]), int(sys.argv[2])
rename, calls = type(root).rename, []

def rename_or_die(self, target):
    calls.append(target)
    if len(calls) == fatal_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

type(root).rename = rename_or_die
with atomic_directory(root / "some" / "thing", root, overwrite=True) as temporary:
    (temporary / "some" / "thing").mkdir(parents=True)
    (temporary / "some" / "thing" / "content").write_text("new")
"""


def replace(root, content):
    with atomic_directory(root / "some" / "thing", root, overwrite=True) as temporary:
        (temporary / "some" / "thing").mkdir(parents=True)
        (temporary / "some" / "thing" / "content").write_text(content)


@pytest.fixture
def root(tmp_path):
    root = epath.Path(tmp_path)
    replace(root, "old")
    return root


def content(root):
    return (root / "some/thing/content").read_text()


def names(root):
    return [path.name for path in root.iterdir()]


@pytest.mark.parametrize("fatal_call", [1, 2])
def test_a_killed_writer_leaves_the_old_directory(root, fatal_call):
    process = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, root, str(fatal_call)], cwd=ROOT, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert len(names(root)) == 2
    recover_directory(root / "some" / "thing", root)
    assert (content(root), names(root)) == ("old", ["some"])
    replace(root, "new")
    assert (content(root), names(root)) == ("new", ["some"])


def test_a_failing_writer_leaves_the_old_directory(root, monkeypatch):
    rename = type(root).rename

    def failing_rename(self, target):
        if self.name == "thing" == target.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(root), "rename", failing_rename)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        replace(root, "new")
    assert (content(root), names(root)) == ("old", ["some"])


def test_the_files_of_running_processes_and_other_machines_are_kept(root):
    running = f"{socket.gethostname()}.{os.getpid()}.abc"
    for name in (f".incomplete.some.thing.{running}", ".incomplete.some.thing.elsewhere.1.abc"):
        (root / name).mkdir()
    replace(root, "new")
    assert len(names(root)) == 3


def test_an_existing_directory_is_replaced_only_with_overwrite(root):
    with (
        pytest.raises(InputError, match="exists; allowed"),
        atomic_directory(root / "some" / "thing", root, overwrite=False),
    ):
        pytest.fail("the body must not run")
    assert (content(root), names(root)) == ("old", ["some"])
