"""What was found: rows of figures, shown as tables and written as JSON."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax
from rich.table import Table

from mister_jax.errors import InputError

Row = dict[str, Any]

PREDICTED = "predicted by the compiler and the chips' data sheets"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      settings: what was asked for.
      environment: of the machine, with figures of the whole process.
      sections: rows by title; a value is None where it does not apply.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    sections: dict[str, list[Row]]

    @property
    def fits(self) -> bool:
        """No row says that it does not fit."""
        return all(row.get("fits") is not False for rows in self.sections.values() for row in rows)

    def write(self, path: str | os.PathLike) -> None:
        """Writes all of it as JSON; the rows are one list and name their section."""
        rows = [
            {"section": title, **row} for title, found in self.sections.items() for row in found
        ]
        value = {"settings": self.settings, "environment": self.environment, "rows": rows}
        try:
            pathlib.Path(path).write_text(json.dumps(value, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error

    def tables(self) -> list[Table]:
        """The settings and the environment, and a table a section."""
        about = {name: value for name, value in self.settings.items() if value}
        titled = {"": [{**about, **self.environment}], **self.sections}
        return [_table(title, rows) for title, rows in titled.items()]


def report_of(
    settings: dict[str, Any], sections: dict[str, list[Row]], compare: bool = False
) -> Report:
    """A report with the environment it was made in."""
    return Report(settings, _environment(compare), sections)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def _table(title: str, rows: Sequence[Row]) -> Table:
    """A column a value, or a row a value where the rows are few."""
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row.get(name) is not None for row in rows)
    ]
    lines = [[name.replace("_", " ") for name in names]]
    lines += [[_shown(row.get(name)) for name in names] for row in rows]
    if len(names) > len(rows):
        lines = [list(line) for line in zip(*lines, strict=True)]
    header, *body = lines
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for line in body:
        table.add_row(*line)
    return table


def _environment(compare: bool) -> dict[str, Any]:
    """What the figures depend on, and the most memory this process has held."""
    device: Any = jax.devices()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "host_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }
    if compare and importlib.util.find_spec("torch") is not None:
        import torch

        found |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    return found
