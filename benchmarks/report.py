"""Shows benchmark results as tables, and writes them as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.table import Table

from mister_jax.errors import InputError

Row = dict[str, Any]

PREDICTED = "predicted from XLA's analyses and the chips' data sheets"


@dataclasses.dataclass(frozen=True)
class Report:
    """Results of a benchmark, as rows by title. Values that do not apply are None."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    sections: dict[str, list[Row]]

    @property
    def fits(self) -> bool:
        """Whether all programs fit in device memory; True for devices with unknown memory."""
        return all(row.get("fits") is not False for rows in self.sections.values() for row in rows)

    def write(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON, with one list of rows; each row names its section."""
        rows = [{"section": title, **row} for title, rows in self.sections.items() for row in rows]
        value = {"settings": self.settings, "environment": self.environment, "rows": rows}
        try:
            pathlib.Path(path).write_text(json.dumps(value, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error

    def tables(self, width: int) -> list[Table]:
        """Returns tables of settings and environment, and of each section.

        Args:
          width: Maximum number of characters in a line. The columns of a wider table are divided
            among several tables.
        """
        settings = {name: value for name, value in self.settings.items() if value}
        titled = {"": [settings | self.environment], **self.sections}
        return [table for title, rows in titled.items() for table in _tables(title, rows, width)]


def environment() -> dict[str, Any]:
    """Returns the machine, package versions and the peak memory of this process."""
    device: Any = jax.devices()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "host_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }
    if "torch" in sys.modules:
        import torch

        result |= {"torch_version": torch.__version__, "torch_threads": torch.get_num_threads()}
    return result


def _tables(title: str, rows: Sequence[Row], width: int) -> Iterator[Table]:
    """Yields a table with one column per field, or several tables that repeat the first column.

    Fields without values are omitted. If there are fewer rows than fields, the table is transposed.
    """
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row.get(name) is not None for row in rows)
    ]
    if not names:
        return
    lines = [[name.replace("_", " ") for name in names]]
    lines += [[_format(row.get(name)) for name in names] for row in rows]
    if len(names) <= len(rows):
        lines = [list(line) for line in zip(*lines, strict=True)]
    first, *columns = lines
    groups = [[first, *columns[:1]]]
    for column in columns[1:]:
        if _table_width([*groups[-1], column]) <= width:
            groups[-1].append(column)
        else:
            groups.append([first, column])
    for group in groups:
        table = Table(title=title, title_justify="left")
        for index, (header, *_) in enumerate(group):
            table.add_column(header, justify="right" if index else "left")
        for line in zip(*(cells for _, *cells in group), strict=True):
            table.add_row(*line)
        yield table


def _table_width(columns: Sequence[Sequence[str]]) -> int:
    """Returns the number of characters in a line, with padding and borders."""
    return 1 + sum(max(map(len, column)) + 3 for column in columns)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
