"""A directory is there as a whole or not at all, whatever ends the process that writes it."""

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

# Replaces a directory and is killed at the given of its renames: 1 puts the old one aside, 2 puts
# the new one in its place.
KILLED = """
import os, signal, sys
from etils import epath
from mister_jax.data.storage import atomic_directory

root, fatal = epath.Path(sys.argv[1]), int(sys.argv[2])
rename, calls = type(root).rename, []

def killing(self, target):
    calls.append(target)
    if len(calls) == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

type(root).rename = killing
with atomic_directory(root / "some" / "thing", root, overwrite=True) as place:
    (place / "some" / "thing").mkdir(parents=True)
    (place / "some" / "thing" / "content").write_text("new")
"""


def replace(root, content):
    with atomic_directory(root / "some" / "thing", root, overwrite=True) as place:
        (place / "some" / "thing").mkdir(parents=True)
        (place / "some" / "thing" / "content").write_text(content)


@pytest.fixture
def root(tmp_path):
    root = epath.Path(tmp_path)
    replace(root, "old")
    return root


def content(root):
    return (root / "some/thing/content").read_text()


def names(root):
    return [path.name for path in root.iterdir()]


@pytest.mark.parametrize("fatal", [1, 2])
def test_a_process_killed_while_it_replaces_leaves_the_old_one(root, fatal):
    done = subprocess.run([sys.executable, "-c", KILLED, root, str(fatal)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(root)) == 2
    recover_directory(root / "some" / "thing", root)
    assert (content(root), names(root)) == ("old", ["some"])
    replace(root, "new")
    assert (content(root), names(root)) == ("new", ["some"])


def test_a_failure_while_replacing_leaves_the_old_one(root, monkeypatch):
    rename = type(root).rename

    def failing(self, target):
        if self.name == "thing" == target.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(root), "rename", failing)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        replace(root, "new")
    assert (content(root), names(root)) == ("old", ["some"])


def test_what_another_process_or_machine_writes_is_left_alone(root):
    ours = f"{socket.gethostname()}.{os.getpid()}.abc"
    for name in (f".incomplete.some.thing.{ours}", ".incomplete.some.thing.elsewhere.1.abc"):
        (root / name).mkdir()
    replace(root, "new")
    assert len(names(root)) == 3


def test_what_exists_is_not_replaced_unasked(root):
    with (
        pytest.raises(InputError, match="exists; allowed"),
        atomic_directory(root / "some" / "thing", root, overwrite=False),
    ):
        pytest.fail("the body is not run")
    assert (content(root), names(root)) == ("old", ["some"])
