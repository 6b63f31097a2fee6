"""What the README shows works."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example, capsys):
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_named_files_exist():
    root = pathlib.Path(__file__).parents[1]
    named = re.findall(r"(?:launch|configs|notebooks)/\w+\.(?:sh|py|ipynb)", README)
    assert named
    assert not [name for name in named if not (root / name).exists()]
