"""The flags of a multi-process job are checked before any process waits."""

import jax
import pytest
from absl import flags

from mister_jax.cli import cluster
from mister_jax.errors import InputError


@pytest.fixture
def parse_flags():
    """Returns a function that parses command-line flags; restores them after the test."""
    defined = flags.FLAGS.__dict__["__flags"]
    before = {name: (flag.value, flag.present) for name, flag in defined.items()}

    def parse(*arguments):
        flags.FLAGS(["job", *arguments])

    yield parse
    for name, (value, present) in before.items():
        defined[name].value, defined[name].present = value, present


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--process_id=0",), "--process_id requires --distributed"),
        (("--distributed", "--num_processes=2"), "pass all of --coordinator"),
        (
            ("--distributed", "--coordinator=here", "--num_processes=2", "--process_id=0"),
            "HOST:PORT",
        ),
        (("--distributed", "--coordinator=h:1", "--num_processes=2", "--process_id=2"), "0 to 1"),
    ],
)
def test_contradictory_flags_are_refused(parse_flags, arguments, message):
    parse_flags(*arguments)
    with pytest.raises(InputError, match=message) as error:
        cluster.initialize()
    assert "\n" not in str(error.value)


def test_single_process_does_not_initialize_jax_distributed(parse_flags, monkeypatch):
    parse_flags()
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("called"))
    cluster.initialize()
