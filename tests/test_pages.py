"""Executed notebooks as pages: complete without a network, readable by a screen reader, and linked to each other."""

import re
from html.parser import HTMLParser

import nbformat
import pytest
from helpers import ROOT

from backpack_lib.running.notebook import Outcome
from backpack_lib.running.pages import page, title_of, write_index

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
def test_a_page_needs_nothing_from_anywhere(path):
    notebook = nbformat.read(path, as_version=4)
    formulas = sum(
        len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", c.source, re.S)) for c in notebook.cells if c.cell_type == "markdown"
    )
    text = page(notebook, title_of(notebook))
    made = Page(text)
    assert all(source.startswith("data:") for source in made.loaded), made.loaded
    assert not re.search(r"url\((?!['\"]?data:)|@import|import\(|require\(", text)
    assert made.tags.count("math") == formulas and "MathJax" not in text
    mathml = " ".join(re.findall(r"<math.*?</math>", text, re.S))
    assert "\\" not in mathml, re.findall(r".{30}\\.{30}", mathml)
    assert made.pictures and all(alt and len(alt) > 40 for alt in made.pictures), made.pictures
    assert "application/vnd.jupyter.widget-view+json" not in text


def test_the_index_leads_to_every_page_and_pages_to_each_other(tmp_path):
    outcomes = []
    for path in NOTEBOOKS:
        copy = tmp_path / path.stem / path.name
        copy.parent.mkdir()
        copy.write_bytes(path.read_bytes())
        outcomes.append(Outcome(path.stem, 1.25, "p < .05 & more", copy, failed=False))
    elsewhere = tmp_path / "runs"
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere):
        index = write_index(outcomes, folder)
        text = index.read_text()
        assert "p &lt; .05 &amp; more" in text and "1.2" in text
        for link in Page(text).links:
            assert (folder / link).is_file() or link.startswith("file:///"), link
    for path in NOTEBOOKS:
        pages = [
            link
            for link in Page((tmp_path / path.stem / f"{path.stem}.html").read_text()).links
            if link.startswith("../")
        ]
        assert pages
        for link in pages:
            file, _, place = link.partition("#")
            target = (tmp_path / path.stem / file).read_text()
            assert not place or f'id="{place}"' in target, link
