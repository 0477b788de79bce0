"""Heat maps show every cell, escaped, in a page that needs nothing else."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fabric.errors import RequestInvalid
from fabric.sdk.heatmap import Heatmap, ink, shown


def make(values: object, words: list[list[str]] | None = None, **more: object) -> Heatmap:
    array = np.asarray(values, dtype=np.float32)
    words = words or [["" for _ in row] for row in array]
    rows = [f"layer {i}" for i in range(len(array))]
    columns = [str(i) for i in range(array.shape[1])]
    return Heatmap(cells=words, values=array, rows=rows, columns=columns, **more)  # type: ignore[arg-type]


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    heatmap = make([[0.1, 0.9]], [["<script>", " Paris"]], title="<b>", legend="how likely")
    heatmap.save(tmp_path / "lens.html")
    page = (tmp_path / "lens.html").read_text()
    cells = Cells()
    cells.feed(page)
    assert {"<script>", "Paris"} <= set(cells.texts)
    assert "script" not in cells.tags
    assert "http" not in page


def test_rows_stand_from_the_bottom_up() -> None:
    page = make([[0.0], [1.0], [0.5]]).to_html()
    assert page.index("layer 2") < page.index("layer 1") < page.index("layer 0")


def test_a_picture_is_drawn_whatever_the_tokens_are(tmp_path: Path) -> None:
    words = [["\n", "\u200b", "漢字"], ["a" * 500, "\x00", " "]]
    heatmap = make([[0.1, np.nan, np.inf], [0.0, 0.3, 1.0]], words, title="t", legend="l")
    heatmap.save(tmp_path / "lens.png")
    with Image.open(tmp_path / "lens.png") as image:
        assert image.width > 300
        assert len(image.getcolors(2**20) or []) > 50
    make([[0.0]]).save(tmp_path / "one.png")


def test_colours_follow_the_values_and_their_sign() -> None:
    heatmap = make([[0.0, 0.5, 1.0]])
    assert [sum(heatmap.colour(v)) for v in (0.0, 0.5, 1.0)] == sorted(
        (sum(heatmap.colour(v)) for v in (0.0, 0.5, 1.0)), reverse=True
    )
    signed = make([[-2.0, 1.0]], around_zero=True)
    assert signed.bounds == (-2.0, 2.0)
    red, _, blue = signed.colour(-2.0)
    assert red > blue
    red, _, blue = signed.colour(2.0)
    assert blue > red
    assert ink((255, 255, 255)) == (17, 17, 17)
    assert ink((8, 29, 88)) == (255, 255, 255)


def test_white_space_is_seen() -> None:
    assert shown("\n") == r"\n"
    assert shown("  ") == "··"
    assert shown(" Paris") == "Paris"
    assert len(shown("x" * 99)) == 14


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match=r"\.png or a \.html"):
        make([[0.0]]).save(tmp_path / "lens.pdf")
