"""Widths of tables in files and pipes."""

import pytest

from mister_jax.console import comparison_table, output_console


@pytest.mark.parametrize(("columns", "is_whole"), [(None, True), ("80", False), ("120", True)])
def test_cells_are_whole_in_files_and_pipes(monkeypatch, capsys, columns, is_whole):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    cell = "a score and its interval"
    table = comparison_table("scores", {f"column {i}": {"model": cell} for i in range(3)})
    output_console().print(table)
    assert (capsys.readouterr().out.count(cell) == 3) == is_whole
