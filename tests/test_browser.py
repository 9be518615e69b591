"""A person in JupyterLab: opens the notebook on senses, runs it, types a word, moves a slider, and sees the answers."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page at once
}
LAUNCH = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=LAUNCH)
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(180_000)
        yield opened
        browser.close()


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on this machine with a copy of the notebook, and nothing of its user's."""
    shutil.copy(ROOT / "notebooks" / "02_senses.ipynb", tmp_path)
    for name, settings in SETTINGS.items():
        file = tmp_path / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | folders | {"PYTHONPATH": str(ROOT), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += ["--IdentityProvider.token=test", f"--ServerApp.root_dir={tmp_path}"]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=test")
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/lab/tree/02_senses.ipynb?token=test"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_a_person_explores_senses_and_edits_in_jupyterlab(lab, page):
    from playwright.sync_api import expect

    page.goto(lab)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # run earlier, cells are cleared and nothing else
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    waiting = page.locator(".jp-InputPrompt", has_text="*")
    waiting.first.wait_for(state="attached")
    waiting.first.wait_for(state="detached")  # none is left
    wrong = [f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("error", "stderr")]
    assert page.locator(", ".join(wrong)).count() == 0

    explorer = page.locator(".jp-OutputArea-output .widget-vbox", has_text="compare with").first
    word = explorer.locator("input[type=text]").first
    word.fill("king")
    word.press("Enter")
    explorer.get_by_text("“king” is one token.").wait_for()
    word.fill("kingfisherish")
    word.press("Enter")
    explorer.get_by_text(re.compile(r"“kingfisherish” is \d tokens: king")).wait_for()

    bench = page.locator(".jp-OutputArea-output .widget-vbox", has_text="write a text").first
    after = bench.locator("table tbody tr").first.locator("td").nth(2)  # of next, before, after
    assert bench.get_by_text("no edits").count() == 1
    before = after.inner_text()
    handle = bench.locator(".noUi-handle").first
    handle.focus()
    for _ in range(10):
        handle.press("ArrowLeft")
    bench.get_by_text(re.compile("scale all senses of .* by .* \\(not kept yet\\)")).first.wait_for()
    expect(after).not_to_have_text(before)
