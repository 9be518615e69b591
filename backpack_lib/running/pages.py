"""Executed notebooks as pages that open from disk, without a network, and an index of them.

Formulas become MathML, which browsers draw themselves; pictures carry their descriptions; an explorer shows its
page as it was when it opened. Nothing is loaded from anywhere.
"""

import re
from base64 import b64decode
from functools import cache
from html import escape
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from backpack_lib.files import written_whole

WIDGET = "application/vnd.jupyter.widget-view+json"
TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}<style>
main { max-width: 62rem; margin: 0 auto; }
.jp-RenderedHTMLCommon table { margin-left: 0; }
.jp-OutputArea-output { overflow-x: auto; }
.highlight pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.jp-RenderedText pre { word-break: normal; overflow-wrap: anywhere; }
.jp-RenderedMarkdown .highlight { margin-bottom: 1em; }
.jp-RenderedImage img { max-width: 100%; height: auto; }
</style>{%- endblock -%}
{%- block data_png scoped -%}
<div class="jp-RenderedImage jp-OutputArea-output"><img src="data:image/png;base64,{{ output.data['image/png'] }}"
alt="{{ (output | get_metadata('alt', 'image/png') or '') | escape_html }}"></div>
{%- endblock -%}
"""
INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Backpack language models</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
td, th {{ text-align: left; vertical-align: top; padding: .5rem .8rem .5rem 0; border-top: 1px solid #8886; }}
.number {{ text-align: right; white-space: nowrap; }}
</style></head><body><h1>Backpack language models</h1>
<p>The notebooks as they were executed on this machine.</p>
<table><tr><th>notebook</th><th class="number">minutes</th><th>result</th></tr>
{rows}
</table></body></html>
"""
ROW = '<tr><td><a href="{page}">{title}</a></td><td class="number">{minutes:.1f}</td><td>{result}</td></tr>'


class _Renderer(IPythonRenderer):
    """Markdown with its formulas as MathML."""

    def block_math(self, body):
        return convert(body.strip(), display="block")

    def inline_math(self, body):
        return convert(body.strip())


def _markdown(source: str) -> str:
    return MarkdownWithMath(renderer=_Renderer(escape=False)).render(source)


@cache
def _exporter() -> HTMLExporter:
    loader = DictLoader({"offline.html.j2": TEMPLATE})
    return HTMLExporter(extra_loaders=[loader], template_file="offline.html.j2", filters={"markdown2html": _markdown})


def page(notebook: nbformat.NotebookNode, title: str) -> str:
    """A notebook as HTML that needs nothing else."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", {}):
                output.data.pop(WIDGET, None)  # its page stands in
    made, _ = _exporter().from_notebook_node(notebook, {"metadata": {"name": title}})
    return made


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The first heading. (In a notebook that failed, papermill's note of it stands before.)"""
    headings = (re.search(r"^# (.+)$", cell.source, re.M) for cell in notebook.cells if cell.cell_type == "markdown")
    return next(heading[1] for heading in headings if heading)


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The pictures that an executed notebook shows, as PNG files."""
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    return [b64decode(data["image/png"]) for data in shown if "image/png" in data]


def write_page(copy: Path) -> tuple[str, Path]:
    """Writes an executed notebook's page beside it. Returns its title, and the page's path."""
    notebook = nbformat.read(copy, as_version=4)
    title = title_of(notebook)
    # Notebooks point to each other as files of one folder; executed, each has a folder of its own.
    made = re.sub(r'href="(\d\d_\w+)\.ipynb(#\w+)?"', r'href="../\1/\1.html\2"', page(notebook, title))
    target = copy.with_suffix(".html")
    with written_whole(target) as building:
        building.write_text(made, encoding="utf-8")
    return title, target


def write_index(outcomes: list, folder: Path) -> Path:
    """Writes the page of each outcome's executed notebook, and an index of them into a folder. Returns its path."""
    rows = []
    for outcome in outcomes:
        title, target = write_page(outcome.copy)
        address = escape(target.relative_to(folder).as_posix() if target.is_relative_to(folder) else target.as_uri())
        rows.append(
            ROW.format(page=address, title=escape(title), minutes=outcome.minutes, result=escape(outcome.result))
        )
    index = folder / "index.html"
    with written_whole(index) as building:
        building.write_text(INDEX.format(rows="\n".join(rows)), encoding="utf-8")
    return index
