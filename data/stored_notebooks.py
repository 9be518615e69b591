"""Tidies the notebooks after they were executed in place: no progress bars; and the README's picture is the tour's."""

from pathlib import Path

import nbformat

from backpack_lib.running.pages import drop_bars, pictures

ROOT = Path(__file__).resolve().parent.parent

for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
    notebook = nbformat.read(file, as_version=4)
    drop_bars(notebook)
    nbformat.write(notebook, file)
    if file.stem == "00_tour":
        (ROOT / "data" / "tour.png").write_bytes(pictures(notebook)[0])
