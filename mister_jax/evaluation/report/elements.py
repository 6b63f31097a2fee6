"""Builds HTML elements, tables, legends and formatted scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from mister_jax.evaluation.confidence_intervals import Estimate


def element(name: str, content: str = "", **attributes: Any) -> str:
    """Returns an HTML or SVG element with tag `name`.

    In attribute names, underscores become hyphens, and `class_` becomes `class`. Attribute values
    are escaped, and floats are rounded to one decimal.
    """
    text = ""
    for key, value in attributes.items():
        value = coordinate(value) if isinstance(value, float) else str(value)
        text += f' {key.removesuffix("_").replace("_", "-")}="{escape(value)}"'
    return f"<{name}{text}>{content}</{name}>"


def coordinate(value: float) -> str:
    """Formats a number with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> str:
    """Returns a table of HTML cells, with a label for screen readers.

    The first cell in a row is the row's heading. Wide tables scroll sideways.
    """
    headings = "".join(element("th", cell, scope="col") for cell in head)
    body = "".join(
        element(
            "tr",
            element("th", row[0], scope="row") + "".join(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    )
    content = element(
        "table",
        element("caption", escape(label), class_="hidden")
        + element("thead", element("tr", headings))
        + element("tbody", body),
        class_=class_,
    )
    return element("div", content, class_="scroll", role="region", tabindex=0, aria_label=label)


def details(title: str, content: str) -> str:
    """Returns content that is collapsed below a title."""
    return element("details", element("summary", escape(title)) + content)


def legend(swatches: Iterable[tuple[str, str]], **attributes: Any) -> str:
    """Returns a legend. Each entry has a CSS class, which sets the color, and a text."""
    items = "".join(element("li", swatch(color) + escape(text)) for color, text in swatches)
    return element("ul", items, class_="legend", **attributes)


def expert_legend(experts: Sequence[str]) -> str:
    """Returns the legend of the experts' colors."""
    return legend(((name, name) for name in experts), aria_label="Colors of the experts")


def swatch(color: str) -> str:
    """Returns a square in the color of a CSS class."""
    return element("span", class_=f"swatch {color}", aria_hidden="true")


def estimate_cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Formats an estimate with its interval below, or a dash for None. `signed` adds plus signs."""
    if estimate is None:
        return element("span", "&ndash;", class_="none")

    def number(value: float) -> str:
        return f"{value:{'+' if signed else ''}.3f}".replace("-", "&minus;")

    text = element("span", number(estimate.value), class_="value")
    if estimate.low is not None and estimate.high is not None:
        separator = " to " if signed else "&ndash;"
        interval = separator.join((number(estimate.low), number(estimate.high)))
        text += element("span", interval, class_="interval")
    return text
