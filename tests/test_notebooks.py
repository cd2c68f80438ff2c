"""The notebooks hold: they run, with errors and warnings fatal, what they draw is there, and the pairs are in step.

A notebook is a pair: `name.py` in the percent format is the source, `name.ipynb` is made of it
(`notebooks/README.md`). What a notebook claims it asserts, so running it is the test of its text.
"""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import text_models
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(source: Path) -> list[tuple[str, str]]:
    """(kind, text) of the cells of a file in the percent format."""
    _, *parts = re.split(r"^# %%(.*)\n", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        assert title in ("", " [markdown]"), f"{source.name}: unknown kind of cell {title!r}"
        if title:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(("markdown" if title else "code", body.strip("\n")))
    return found


def test_every_notebook_is_a_pair() -> None:
    assert {path.stem for path in SOURCES} == {path.stem for path in FOLDER.glob("*.ipynb")} != set()


@each_notebook
def test_the_pair_is_in_step(source: Path) -> None:
    notebook: dict[str, Any] = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    theirs = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert theirs == cells(source), f"make it anew: jupytext --update --to ipynb notebooks/{source.name}"
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs are not kept: they would go stale"


def check_figure(figure: Figure) -> None:
    """Something is drawn, every drawing has a title and named axes, every picture a scale that says what it is."""
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    panels = [axes for axes in figure.axes if axes not in bars]
    assert panels
    assert all(axes.has_data() and axes.get_title() and axes.get_xlabel() for axes in panels)
    assert all(axes.get_ylabel() or any(t.get_text() for t in axes.get_yticklabels()) for axes in panels)
    assert bars or not any(axes.images for axes in panels)
    assert all(axes.get_ylabel() for axes in bars)
    for axes in panels:
        for picture in axes.images:
            values = np.asarray(picture.get_array())
            assert np.isfinite(values).all()
            assert np.ptp(values) > 0
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 16


@each_notebook
def test_it_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_models.minilm()
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context():
        plt.close("all")
        try:
            runpy.run_path(str(source), run_name="__main__")
            figures = [plt.figure(number) for number in plt.get_fignums()]
            assert len(figures) == source.read_text(encoding="utf-8").count("plt.subplots(") > 0
            for figure in figures:
                check_figure(figure)
        finally:
            plt.close("all")
