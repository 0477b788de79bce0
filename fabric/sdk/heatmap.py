"""Heat maps of short texts: as a page of HTML that needs nothing else, or as a picture.

Rows are drawn from the bottom up, as layers are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric.errors import PackageMissing, RequestInvalid

if TYPE_CHECKING:
    from fabric.sdk.arrays import Array

Colour = tuple[int, int, int]

# Brewer's YlGnBu, light to dark: it stays readable in grey. Source: https://colorbrewer2.org.
_COLOURS: tuple[Colour, ...] = (
    (255, 255, 217),
    (237, 248, 177),
    (199, 233, 180),
    (127, 205, 187),
    (65, 182, 196),
    (29, 145, 192),
    (34, 94, 168),
    (37, 52, 148),
    (8, 29, 88),
)
# And its RdBu, for values around zero.
_DIVERGING: tuple[Colour, ...] = (
    (178, 24, 43),
    (214, 96, 77),
    (244, 165, 130),
    (253, 219, 199),
    (247, 247, 247),
    (209, 229, 240),
    (146, 197, 222),
    (67, 147, 195),
    (33, 102, 172),
)
_SEEN = {ord("\n"): r"\n", ord("\t"): r"\t", ord("\r"): r"\r", ord(" "): "·"}
_SCALE = 2
"""Pixels of a point: pictures are for screens of twice the resolution."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """Cells with a text and a value each.

    Args:
        cells: Texts, [rows][columns]; empty ones show their colour alone.
        values: Numbers, [rows, columns].
        rows: Labels of the rows, the first one at the bottom.
        columns: Labels of the columns.
        title: Above it.
        legend: What the values are.
        around_zero: Whether the sign of a value matters.
    """

    cells: Sequence[Sequence[str]]
    values: Array
    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""
    legend: str = ""
    around_zero: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The values of the first and the last colour."""
        finite = [float(value) for value in self.values.ravel() if math.isfinite(value)] or [0.0]
        if self.around_zero:
            most = max(map(abs, finite)) or 1.0
            return -most, most
        return min(0.0, *finite), max(finite) or 1.0

    def colour(self, value: float) -> Colour:
        """Return a value's colour; what is no number is grey."""
        if not math.isfinite(value):
            return 200, 200, 200
        low, high = self.bounds
        return _mix(_DIVERGING if self.around_zero else _COLOURS, (value - low) / (high - low))

    def to_html(self) -> str:
        """Return a table for a page or a notebook."""
        style = "border:1px solid #fff;padding:2px 6px;text-align:center;white-space:pre"
        lines = []
        for row in reversed(range(len(self.rows))):
            cells = [f'<th style="{style};text-align:right">{escape(self.rows[row])}</th>']
            for text, value in zip(self.cells[row], self.values[row], strict=True):
                colour = self.colour(float(value))
                look = f"{style};background:rgb{colour};color:{_ink_name(colour)}"
                cells.append(f'<td style="{look}" title="{value:.4g}">{escape(shown(text))}</td>')
            lines.append(f"<tr>{''.join(cells)}</tr>")
        heads = "".join(f'<th style="{style}">{escape(shown(text))}</th>' for text in self.columns)
        lines.append(f"<tr><th></th>{heads}</tr>")
        low, high = self.bounds
        foot = f"{escape(self.legend)}: {low:.3g} to {high:.3g}" if self.legend else ""
        return (
            '<div style="font:12px system-ui,sans-serif;overflow-x:auto">'
            f'<div style="font-weight:600;margin:4px 0">{escape(self.title)}</div>'
            f'<table style="border-collapse:collapse">{"".join(lines)}</table>'
            f'<div style="opacity:.65">{foot}</div></div>'
        )

    def save(self, path: str | Path) -> None:
        """Write it as a file: ``.html`` or ``.png``.

        Raises:
            RequestInvalid: The name ends otherwise.
            PackageMissing: Pillow is not there to draw a picture.
        """
        path = Path(path)
        match path.suffix.lower():
            case ".html":
                page = f'<!doctype html><meta charset="utf-8"><title>{escape(self.title)}</title>'
                path.write_text(page + self.to_html(), encoding="utf-8")
            case ".png":
                self.to_image().save(path, optimize=True)
            case _:
                raise RequestInvalid(
                    param="output", value=str(path), reason="a heat map is a .png or a .html file"
                )

    def to_image(self) -> Any:
        """Return it as a ``PIL.Image``.

        Raises:
            PackageMissing: Pillow is not there.
        """
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise PackageMissing(package="pillow", extra="plots") from error
        font = ImageFont.load_default(12 * _SCALE)
        bold = ImageFont.load_default(14 * _SCALE)

        def wide(text: str) -> int:
            return math.ceil(font.getlength(text))

        height, gap = 22 * _SCALE, 8 * _SCALE
        missing = bytes(font.getmask("\uffff"))

        def drawn(text: str) -> str:
            return "".join("?" if bytes(font.getmask(c)) == missing else c for c in shown(text))

        labels = [drawn(text) for text in self.columns]
        texts = [[drawn(text) for text in row] for row in self.cells]
        widths = [
            max([wide(labels[c]), *(wide(row[c]) for row in texts), 14 * _SCALE]) + gap
            for c in range(len(labels))
        ]
        left = max(map(wide, self.rows)) + 2 * gap
        top = (34 if self.title else 10) * _SCALE
        bottom = top + height * len(texts)
        bar = sum(widths[:12]) if len(widths) > 12 else sum(widths)
        size = (left + max(sum(widths), 200 * _SCALE) + gap, bottom + height * 3 + gap)
        image = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(image)
        draw.text((left, 8 * _SCALE), self.title, fill="#111", font=bold)
        for row, line in enumerate(texts):
            y = bottom - (row + 1) * height
            draw.text((left - gap, y + height / 2), self.rows[row], "#333", font, anchor="rm")
            x = left
            for column, text in enumerate(line):
                colour = self.colour(float(self.values[row][column]))
                box = (x, y, x + widths[column] - _SCALE, y + height - _SCALE)
                draw.rectangle(box, fill=colour)
                middle = (x + widths[column] / 2, y + height / 2)
                draw.text(middle, text, ink(colour), font, anchor="mm")
                x += widths[column]
        x = left
        for width, label in zip(widths, labels, strict=True):
            draw.text((x + width / 2, bottom + height / 2), label, "#333", font, anchor="mm")
            x += width
        self._draw_legend(draw, font, (left, bottom + height + gap), max(bar, 120 * _SCALE))
        return image

    def _draw_legend(self, draw: Any, font: Any, at: tuple[float, float], width: int) -> None:
        if not self.legend:
            return
        (x, y), (low, high) = at, self.bounds
        width = min(width, 160 * _SCALE)
        for step in range(width):
            colour = self.colour(low + (high - low) * step / width)
            draw.line((x + step, y, x + step, y + 8 * _SCALE), fill=colour)
        text = f"{self.legend}: {low:.3g} to {high:.3g}"
        draw.text((x, y + 12 * _SCALE), text, fill="#333", font=font)


def shown(text: str, most: int = 14) -> str:
    """Return a token's text with its spaces and control characters visible, and not too long."""
    if not text.strip() or not text.isprintable():
        text = text.translate(_SEEN)
    visible = "".join(c if c.isprintable() else "?" for c in text.strip(" "))
    return visible if len(visible) <= most else visible[: most - 1] + "…"


def _mix(colours: Sequence[Colour], part: float) -> Colour:
    at = min(max(part, 0.0), 1.0) * (len(colours) - 1)
    first = min(int(at), len(colours) - 2)
    weight = at - first
    pair = zip(colours[first], colours[first + 1], strict=True)
    red, green, blue = (round(a + (b - a) * weight) for a, b in pair)
    return red, green, blue


def ink(colour: Colour) -> Colour:
    """Return the colour of text that can be read on a colour."""
    red, green, blue = colour
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return (17, 17, 17) if is_light else (255, 255, 255)


def _ink_name(colour: Colour) -> str:
    return f"rgb{ink(colour)}"
