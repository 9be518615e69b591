"""Executed notebooks as pages: complete without a network, readable by a screen reader, and linked to each other."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from helpers import ROOT

from backpack_lib.running.notebook import Outcome
from backpack_lib.running.pages import drop_bars, page, write_index

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class Page(HTMLParser):
    """What a page asks for, its pictures, and its formulas."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.links, self.pictures, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(attrs.get("href", ""))
        elif tag == "link" or "src" in attrs:
            self.loaded.append(attrs.get("src") or attrs.get("href"))
        if tag == "img":
            self.pictures.append(attrs.get("alt"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_needs_nothing_from_anywhere_and_describes_its_pictures(path):
    text = page(nbformat.read(path, as_version=4), path.stem)
    parsed = Page(text)
    assert all(source.startswith("data:") for source in parsed.loaded), parsed.loaded
    assert not re.search(r"url\((?!['\"]?data:)|@import", text) and "script" not in parsed.tags
    mathml = " ".join(re.findall(r"<math.*?</math>", text, re.DOTALL))
    assert mathml and "\\" not in mathml, re.findall(r".{30}\\.{30}", mathml)
    assert parsed.pictures and all(alt and len(alt) > 40 for alt in parsed.pictures), parsed.pictures
    assert "application/vnd.jupyter.widget-view+json" not in text


def test_the_index_leads_to_every_page_and_pages_to_each_other(tmp_path):
    outcomes, runs = [], tmp_path / "runs {1} 2"
    for path in NOTEBOOKS[:2]:
        notebook, copy = nbformat.read(path, as_version=4), runs / path.stem / path.name
        for cell in notebook.cells:
            cell |= {"outputs": []} if cell.cell_type == "code" else {}
        copy.parent.mkdir(parents=True)
        nbformat.write(notebook, copy)
        outcomes.append(Outcome(path.stem, 1.25, "p < .05 & more", copy, failed=False))
    text = write_index(outcomes, runs).read_text()
    assert "p &lt; .05 &amp; more" in text and "1.2" in text
    links = Page(text).links
    assert len(links) == 2 and all((runs / unquote(link)).is_file() for link in links)
    first, second = (Path(outcome.copy).with_suffix(".html") for outcome in outcomes)
    links = [link for link in Page(first.read_text()).links if link.startswith(f"../{second.parent.name}/")]
    assert links
    for link in links:
        file, _, place = link.partition("#")
        assert (first.parent / file).resolve() == second and (not place or f'id="{place}"' in second.read_text())


def test_progress_bars_are_left_out_and_explorers_stay():
    def output(**data):
        return nbformat.v4.new_output("display_data", data=data)

    kind = "application/vnd.jupyter.widget-{}+json"
    bar = output(**{kind.format("view"): {"model_id": "3"}, "text/plain": "0%|"})
    explorer = output(**{kind.format("view"): {"model_id": "1"}, "text/html": "<p>senses</p>"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[bar, explorer])])
    state = {"1": {"state": {"children": ["IPY_MODEL_2"]}}, "2": {"state": {}}, "3": {"state": {"value": "12it/s"}}}
    notebook.metadata["widgets"] = {kind.format("state"): {"state": state}}
    drop_bars(notebook)
    assert set(notebook.metadata["widgets"][kind.format("state")]["state"]) == {"1", "2"}
    text = page(notebook, "one")
    assert "0%|" not in text and "<p>senses</p>" in text
