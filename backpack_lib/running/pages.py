"""Executed notebooks as pages that open without a network, formulas as MathML, and an index of them."""

import json
import os
import re
from base64 import b64decode
from html import escape
from pathlib import Path
from urllib.parse import quote

import nbformat
import pandas as pd
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from backpack_lib.files import write_text
from backpack_lib.running.notebook import saved_widgets

WIDGET = "application/vnd.jupyter.widget-view+json"
STYLE = """<style>
main { max-width: 62rem; margin: 0 auto; }
.jp-OutputArea-output { overflow-x: auto; }
.highlight pre, .jp-RenderedText pre { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
</style>"""


class _Renderer(IPythonRenderer):
    def block_math(self, body):
        return convert(body.strip(), display="block")

    def inline_math(self, body):
        return convert(body.strip())


def page(notebook: nbformat.NotebookNode, title: str) -> str:
    """A notebook as HTML that needs nothing else."""
    drop_bars(notebook)
    for output in _outputs(notebook):
        if "text/html" in output.data:
            output.data.pop(WIDGET, None)  # its page stands in
        elif "image/png" in output.data:  # the exporter would leave out what describes it
            alt = escape(output.metadata.get("image/png", {}).get("alt", ""))
            output.data["text/html"] = f'<img src="data:image/png;base64,{output.data["image/png"]}" alt="{alt}">'
    markdown = MarkdownWithMath(renderer=_Renderer(escape=False)).render
    exporter = HTMLExporter(filters={"markdown2html": markdown})
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    html = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)  # for formulas and widgets, from the network
    return html.replace("</head>", f"{STYLE}</head>", 1)


def drop_bars(notebook: nbformat.NotebookNode):
    """Takes progress bars out: widgets that have no page to show without a kernel."""
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) or "text/html" in o.data]
    saved = saved_widgets(notebook.metadata)
    waiting = [o.data[WIDGET]["model_id"] for o in _outputs(notebook) if WIDGET in o.get("data", {})]
    shown = set()  # and what those are made of
    while waiting:
        model = waiting.pop()
        if model in saved and model not in shown:
            shown.add(model)
            waiting += re.findall(r"IPY_MODEL_(\w+)", json.dumps(saved[model]))
    for model in set(saved) - shown:
        del saved[model]


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The pictures that an executed notebook shows, as PNG files."""
    return [b64decode(output.data["image/png"]) for output in _outputs(notebook) if "image/png" in output.data]


def write_index(outcomes: list, folder: Path) -> Path:
    """Writes a page beside each outcome's executed notebook, and an index of them into a folder. Returns its path."""
    rows = []
    for outcome in outcomes:
        # Notebooks point to each other as files of one folder; executed, each has a folder of its own.
        html = page(nbformat.read(outcome.copy, as_version=4), outcome.notebook)
        target = outcome.copy.with_suffix(".html")
        write_text(target, re.sub(r'href="(\d\d_\w+)\.ipynb(#\w+)?"', r'href="../\1/\1.html\2"', html))
        address = quote(Path(os.path.relpath(target, folder)).as_posix())
        link = f'<a href="{address}">{escape(outcome.notebook)}</a>'
        rows.append({"notebook": link, "minutes": round(outcome.minutes, 1), "result": escape(outcome.result)})
    table = pd.DataFrame(rows).to_html(index=False, escape=False, border=0)
    head = f'<meta charset="utf-8"><title>Backpack language models</title>{STYLE}'
    write_text(folder / "index.html", f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{table}</body></html>')
    return folder / "index.html"
