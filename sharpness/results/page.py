"""One self-contained page: what it is made of, and its HTML.

The same record gives the same bytes: nothing of the day, of the machine or of the user's settings gets in.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names its lines."""

    title: str
    headers: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawing in SVG, and what it shows in words."""

    svg: str
    label: str


@final
@dataclass(frozen=True, kw_only=True)
class Page:
    """The parts of a page, from top to bottom; all texts are plain and are escaped when they are rendered."""

    title: str
    lead: str
    warnings: Sequence[str]
    notes: Sequence[str] = ()
    table: Table
    pictures: Sequence[Picture] | None = ()  # None: there is nothing to draw with
    tables: Sequence[Table] = ()
    meanings: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    footer: str = ""

    def fragment(self) -> str:
        """Return the lead, the warnings and the first table, as a notebook shows them."""
        return _render("fragment.html.j2", self)

    def html(self) -> str:
        """Return the whole page."""
        return _render("page.html.j2", self)


def _render(template: str, page: Page) -> str:
    return str(_environment().get_template(template).render(page=page))


@functools.cache
def _environment() -> Any:
    """Return what turns the templates beside this file into text; everything is escaped unless marked safe."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sharpness.results", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["setting"] = _setting
    return environment


def _breakable(text: str) -> Any:
    """Escape ``text``, and let it break after underscores, commas and opening brackets, where a phone needs it."""
    import markupsafe

    parts = [markupsafe.escape(part) for part in re.split(r"(?<=[_,(])", text)]
    return markupsafe.Markup("<wbr>").join(parts)


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "not set", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
