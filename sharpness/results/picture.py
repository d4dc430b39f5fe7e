"""Results drawn without pyplot: for a page, and for a file of pictures.

The user's backend, his settings and his open figures are left alone, and a drawing depends on none of them.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sharpness._write import write_whole
from sharpness.errors import ArgumentError
from sharpness.results.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw: TypeAlias = "Callable[[Axes], object]"
_INK = "#010203"  # what is drawn in it takes the colour of the page's text, light or dark
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_SIZE = (4.4, 3.0)


def pictures(drawings: Sequence[tuple[str, Draw]]) -> list[Picture] | None:
    """Return each drawing as SVG for a page, with its label; ``None`` without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    return [Picture(svg=_svg(draw, label, f"figure{i}-"), label=label) for i, (label, draw) in enumerate(drawings)]


def panels(drawings: Sequence[tuple[str, Draw]]) -> Figure:
    """Return one figure with a panel per drawing, three in a line."""
    with _plain_settings():
        from matplotlib.figure import Figure

        columns = min(len(drawings), 3) or 1
        lines = -(-len(drawings) // columns)
        figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * lines), layout="constrained")
        for i, (label, draw) in enumerate(drawings, start=1):
            axes = figure.add_subplot(lines, columns, i)
            axes.set_title(label, fontsize="medium", parse_math=False)
            draw(axes)
        return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to ``path``, as the kind of picture that its ending says, or as PNG.

    Raises:
        ArgumentError: If the file cannot be written; an older one is then left as it was.
    """
    kind = Path(path).suffix.removeprefix(".").lower() or "png"
    write_whole(path, lambda target: figure.savefig(target, format=kind, dpi=120))


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse a kind of picture that matplotlib cannot write.

    Raises:
        ArgumentError: If the file's ending is none that it knows.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending and ending not in kinds:
        raise ArgumentError(
            f"{os.fspath(path)!r} is no kind of picture known here. Use one of {', '.join(sorted(kinds))}."
        )


def shown_names(axes: Axes, names: Sequence[str], *, vertical: bool = False) -> None:
    """Write names of the user's beside the ticks: as they are, not as formulas; long ones cut, and aslant."""
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    labels = axes.set_yticklabels(short) if vertical else axes.set_xticklabels(short)
    aslant = not vertical and sum(map(len, short)) > 36
    for label in labels:
        label.set_parse_math(False)
        if aslant:
            label.set(rotation=25, ha="right", rotation_mode="anchor")


@contextmanager
def _plain_settings() -> Iterator[None]:
    """Draw with matplotlib's own defaults, and put the user's settings back."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has a font for it
        matplotlib.rcdefaults()
        yield


def _svg(draw: Draw, label: str, prefix: str) -> str:
    """Return a drawing as an ``<svg>`` element whose ids begin with ``prefix``."""
    with _plain_settings():
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        own = {
            **dict.fromkeys(_INKED, _INK),
            "svg.hashsalt": "sharpness",
            "svg.fonttype": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.framealpha": 0.0,
        }
        settings: Any = matplotlib.rcParams
        settings.update(own)
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        silent: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=silent)
    return _inline(file.getvalue(), label, prefix)


def _inline(svg: str, label: str, prefix: str) -> str:
    """Turn a file of SVG into an element of a page."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[-0-9. ]+"', head)
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", rest, flags=re.DOTALL)
    rest = re.sub(r"<[^>]*>", lambda tag: _own_tag(tag[0], prefix), rest)
    rest = "\n".join(line for line in rest.splitlines() if line.strip())
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">\n{rest}'


def _own_tag(tag: str, prefix: str) -> str:
    """Give the ids in a tag, and the references to them, a prefix; texts between tags stay as they are."""
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", tag)
    return tag.replace("xlink:href", "href").replace(_INK, "currentColor")
