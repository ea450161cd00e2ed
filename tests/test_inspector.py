"The packing inspector in JupyterLab, driven by a browser: a million tokens, sliders, hover, picks, in the light and in the dark."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs a Chromium')

ROWS = '''
import numpy as np, time, torch
from PIL import Image
from omnilab.data.parts import Message, Part, Sample
from omnilab.forest.inspector import Inspector
from omnilab.forest.packs_view import rebin, spans
from omnilab.forest.tree import Row, forest
WORDS = 'what is on the left of this picture a small red circle and two blue squares below it near another green one there'.split()
g, trees, n = np.random.default_rng(0), [], 0
while n < 1_000_000:
    kind = int(g.choice(4, p=(.5, .3, .1, .1)))
    head = np.concatenate([g.integers(5, 27, g.integers(10, 60)), np.full(g.integers(64, 250), kind) if kind else [4]])
    s = Sample([Message('user', [Part('image', Image.new('RGB', (640, 480), tuple(int(c) for c in g.integers(0, 255, 3))))])], origin=f'rows.jsonl:{len(trees) + 1}')
    rows = []
    for _ in range(int(g.choice((1, 1, 3)))):
        ids = np.concatenate([head, g.integers(5, 27, g.integers(10, 200))])
        known = dict(media_keys=(str(n),), media_end=len(head), sample=s) if kind else {}
        rows.append(Row(torch.tensor(ids), torch.arange(len(ids)) >= len(ids) - int(g.integers(5, 60)) if len(ids) > len(head) + 60 else torch.arange(len(ids)) >= len(head) + 5, **known))
    trees += forest(rows); n = sum(map(len, trees[-3:])) + n
s = spans(trees, {1: 'image', 2: 'video', 3: 'audio'})
'''
SHOW = '''look = Inspector(trees, rebin(s, 8192), lambda i: ' ' + WORDS[i % len(WORDS)])
look'''
COST = '''start = time.process_time()
for n in (8320, 8448, 8576, 8704): look.length.value = n
print('a redraw:', (time.process_time() - start) / 4, 'CPU seconds;', int(s.lengths.sum()), 'tokens')'''


def notebook(*cells):
    code = [dict(cell_type='code', id=f'c{i}', metadata={}, source=c, outputs=[], execution_count=None) for i, c in enumerate(cells)]
    return json.dumps(dict(cells=code, metadata=dict(kernelspec=dict(name='python3', display_name='python3')), nbformat=4, nbformat_minor=5))


@contextmanager
def jupyterlab(folder):
    "A JupyterLab of its own: settings, kernels and files in a folder; gives its address."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    homes = {k: str(folder/'home') for k in ('HOME', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMNILAB_', 'JUPYTER'))} | homes | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    args = ['--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=lab', '--allow-root', '--LabApp.news_url=']
    with open(folder/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *args], cwd=folder, env=env, stdout=log, stderr=log)
        try:
            for _ in range(240):
                assert server.poll() is None, (folder/'log').read_text()
                try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token=lab', timeout=5); break
                except OSError: time.sleep(.5)
            yield f'http://127.0.0.1:{port}/lab/tree/look.ipynb?token=lab'
        finally: server.terminate(); server.wait(30)


@contextmanager
def page(address):
    "A tab of a Chromium."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        tab = browser.new_page(viewport=dict(width=1500, height=1250))
        tab.set_default_timeout(120_000)
        tab.goto(address)
        try: yield tab
        finally: browser.close()


def shot(tab, name):
    "Keep a screenshot, where a person asked for it."
    if (folder := os.environ.get('SCREENSHOTS')): tab.screenshot(path=str(Path(folder)/f'{name}.png'))


def changed(tab, old):
    "Wait until the bars are another picture, and return it."
    tab.wait_for_function("old => { const x = document.querySelector('.omnilab-packs .bars img'); return x && x.src && x.src !== old }", arg=old)
    return tab.get_attribute('.omnilab-packs .bars img', 'src')


def hover(tab, x, y):
    "Move the mouse over the bars, a share of their width and pixels from their top, and read the tip."
    bars = tab.locator('.omnilab-packs .bars img').bounding_box()
    tab.mouse.move(bars['x'] + x * bars['width'] - 2, bars['y'] + y)
    tab.mouse.move(bars['x'] + x * bars['width'], bars['y'] + y)
    tab.wait_for_selector('.omnilab-packs .tip:not([hidden])')
    return tab.inner_html('.omnilab-packs .tip')


def test_inspector(tmp_path):
    pytest.importorskip('playwright')
    (tmp_path/'look.ipynb').write_text(notebook(ROWS, SHOW, COST))
    with jupyterlab(tmp_path) as address, page(address) as tab:
        tab.wait_for_selector('.jp-Notebook-cell')
        tab.wait_for_selector('.jp-NotebookPanel-toolbar')
        tab.wait_for_function("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'")
        tab.click('.jp-Notebook-cell >> nth=0')
        for _ in range(2): tab.keyboard.press('Shift+Enter')
        first = changed(tab, '')
        assert '1,0' in tab.inner_text('.omnilab-packs h4') and tab.locator('.omnilab-packs li').count() == 16
        shot(tab, 'light')
        tab.locator('.omnilab-packs').screenshot(path='/tmp/h/i_widget.png')
