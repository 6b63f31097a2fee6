"""Exit statuses and one-line errors of commands."""

import errno
import os
import signal
import subprocess
import sys
import types

import pytest

from mister_jax.cli import app
from mister_jax.errors import InputError


def os_error(number, *path):
    return OSError(number, os.strerror(number), *path)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("a: b; allowed: c"), 2, "error: a: b; allowed: c\n"),
        (os_error(errno.EROFS, "a"), 2, "error: a: Read-only file system; choose a path that can"),
        (os_error(errno.EACCES, "a"), 2, "error: a: Permission denied; choose a path that can"),
        (os_error(errno.ENOSPC), 2, "error: No space left on device; choose a path that can"),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [28]"),
            2,
            "error: No space left on device; free some space, or choose another path\n",
        ),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    ],
    ids=repr,
)
def test_errors_of_the_user_and_the_system_are_one_line(
    error, status, message, capsys, monkeypatch
):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        app.run(types.SimpleNamespace(main=main))
    assert stop.value.code == status
    stderr = capsys.readouterr().err
    assert stderr.startswith(message) and stderr.count("\n") == 1


@pytest.mark.parametrize(
    "bug", [ValueError("wrong"), os_error(errno.ENOENT, "a"), RuntimeError("wrong")], ids=repr
)
def test_other_errors_keep_their_traceback(bug, monkeypatch):
    def main():
        raise bug

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(type(bug)) as error:
        app.run(types.SimpleNamespace(main=main))
    assert error.value is bug


PRINT = """
import sys, types
from mister_jax.cli import app

count = int(sys.argv.pop())

def main():
    for _ in range(count):
        print("caf\u00e9 \u4f60")

app.run(types.SimpleNamespace(main=main))
"""


def test_the_end_of_the_reader_of_a_pipe_ends_a_command_quietly():
    command = [sys.executable, "-c", PRINT, "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE


def test_texts_are_printed_in_any_encoding():
    command = [sys.executable, "-c", PRINT, "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.check_output(command, env=environment) == b"caf\\xe9 \\u4f60\n"
