"The packing inspector in JupyterLab, driven by a browser: a million tokens, sliders, hover, picks, in the light and in the dark."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='needs a Chromium')]

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
    color = tuple(int(c) for c in g.integers(0, 255, 3))
    s = Sample([Message('user', [Part('image', Image.new('RGB', (640, 480), color))])], origin=f'rows.jsonl:{len(trees) + 1}')
    known, rows = dict(media_keys=(str(n),), media_end=len(head), sample=s) if kind else {}, []
    for _ in range(int(g.choice((1, 1, 3)))):
        ids = np.concatenate([head, g.integers(5, 27, g.integers(10, 200))])
        rows.append(Row(torch.tensor(ids), torch.arange(len(ids)) >= len(ids) - int(g.integers(4, min(60, len(ids) - len(head)))), **known))
    new = forest(rows)
    trees += new; n += sum(map(len, new))
s = spans(trees, {1: 'image', 2: 'video', 3: 'audio'})
'''
SHOW = '''look = Inspector(trees, rebin(s, 8192), lambda i: ' ' + WORDS[i % len(WORDS)])
look'''


def notebook(*cells):
    code = [dict(cell_type='code', id=f'c{i}', metadata={}, source=c, outputs=[], execution_count=None) for i, c in enumerate(cells)]
    return json.dumps(dict(cells=code, metadata=dict(kernelspec=dict(name='python3', display_name='python3')), nbformat=4, nbformat_minor=5))


@contextmanager
def jupyterlab(folder):
    "A JupyterLab of its own: settings, kernels and files in a folder; gives its address."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    (folder/'settings/@jupyterlab/apputils-extension').mkdir(parents=True)
    (folder/'settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings').write_text('{"fetchNews": "false"}')
    homes = {k: str(folder/'home') for k in ('HOME', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMNILAB_', 'JUPYTER'))} | homes
    env |= dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'))
    args = ['--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=lab', '--allow-root',
            '--LabApp.expose_app_in_browser=True']
    with open(folder/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *args], cwd=folder, env=env, stdout=log, stderr=log)
        try:
            session = dict(path='look.ipynb', name='look.ipynb', type='notebook', kernel=dict(name='python3'))           # else the page may ask for a kernel
            start = urllib.request.Request(f'http://127.0.0.1:{port}/api/sessions', json.dumps(session).encode(), {'Authorization': 'token lab'})
            for _ in range(240):
                assert server.poll() is None, (folder/'log').read_text()
                try: urllib.request.urlopen(start, timeout=60); break
                except OSError: time.sleep(.5)
            yield f'http://127.0.0.1:{port}/lab/tree/look.ipynb?token=lab'
        finally: server.terminate(); server.wait(30)


@contextmanager
def page(address):
    "A tab of a Chromium; what it showed when something went wrong is kept, where a person asked for it."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        tab = browser.new_page(viewport=dict(width=1500, height=1300))
        tab.set_default_timeout(180_000)
        try: tab.goto(address); yield tab
        except BaseException: shot(tab, 'wrong'); raise
        finally: browser.close()


def shot(tab, name):
    "Keep a screenshot in the folder that SCREENSHOTS names."
    if (folder := os.environ.get('SCREENSHOTS')): tab.screenshot(path=str(Path(folder)/f'{name}.png'))


def command(tab, name, **args):
    "Run a command of JupyterLab."
    tab.evaluate('([name, args]) => { window.jupyterapp.commands.execute(name, args) }', [name, args])


BARS = '.omnilab-packs .bars img'


def changed(tab, old=''):
    "Wait until the bars are another picture, and return it."
    tab.wait_for_function("([q, old]) => { const x = document.querySelector(q); return x && x.naturalWidth && x.src !== old }", arg=[BARS, old])
    return tab.get_attribute(BARS, 'src')


def point(tab, x, y=5):
    "Move the mouse over the bars: a share of their width, pixels from their top."
    at = tab.locator(BARS).bounding_box()
    for left in (2, 0): tab.mouse.move(at['x'] + x * at['width'] - left, at['y'] + y)


def tip(tab, has):
    "What the tip says, once it has something."
    tab.wait_for_function("has => { const t = document.querySelector('.omnilab-packs .tip'); return !t.hidden && t.innerHTML.includes(has) }", arg=has)
    return tab.inner_text('.omnilab-packs .tip')


FIND = """([q, color]) => {
  const img = document.querySelector(q), c = Object.assign(document.createElement('canvas'), {width: img.naturalWidth, height: img.naturalHeight});
  const g = c.getContext('2d');
  g.drawImage(img, 0, 0);
  const d = g.getImageData(0, 5, c.width, 1).data, same = x => color.every((v, i) => d[4 * x + i] === v);
  for (let x = Math.floor(c.width * .3); x < c.width - 8; x++) if (same(x) && same(x + 8)) return (x + 4.5) / c.width;
}"""
LUMINANCE = """c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] }"""


def contrast(tab):
    "Of the words above the bars with the page behind them."
    ink = tab.evaluate("getComputedStyle(document.querySelector('.omnilab-packs h4')).color")
    paper = tab.evaluate("getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor")
    a, b = sorted(tab.evaluate(f'c => ({LUMINANCE})(c)', c) + .05 for c in (ink, paper))
    return b / a


def test_inspector(tmp_path):
    pytest.importorskip('playwright')
    from omnilab.forest.packs_view import COLOR, rgb
    (tmp_path/'look.ipynb').write_text(notebook(ROWS, SHOW))
    with jupyterlab(tmp_path) as address, page(address) as tab:
        tab.wait_for_selector('.jp-KernelName:has-text("Python 3"), .jp-Toolbar-kernelName:has-text("Python 3")')
        tab.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]')
        command(tab, 'notebook:run-all-cells')
        first = changed(tab)
        assert tab.inner_text('.omnilab-packs h4').startswith('12') and '1,00' in tab.inner_text('.omnilab-packs h4')      # a million tokens in some 123 packs
        assert tab.locator('.omnilab-packs li').all_inner_texts() == [str(i) for i in range(16)]
        assert contrast(tab) > 7

        point(tab, tab.evaluate(FIND, [BARS, (rgb(COLOR['words']) * 255).round().tolist()]))            # hover: words, then a picture
        assert 'pack 0' in tip(tab, '<mark>') and 'of words' in tip(tab, '<mark>')
        image = tab.evaluate(FIND, [BARS, (rgb(COLOR['image']) * 255).round().tolist()])
        point(tab, image)
        assert 'of image' in tip(tab, '<img src="data:image/png') and 'rows.jsonl:' in tip(tab, '640')
        shot(tab, 'light')

        tab.mouse.click(*(lambda at: (at['x'] + image * at['width'], at['y'] + 5))(tab.locator(BARS).bounding_box()))      # pick
        tab.wait_for_selector('.lm-TabBar-tabLabel:has-text("attention of pack 0")')
        tab.click('.lm-TabBar-tabLabel:has-text("tree ")')
        tab.wait_for_function("[...document.querySelectorAll('.widget-image')].some(x => x.offsetParent && x.naturalWidth)")
        shot(tab, 'tree')

        old = tab.get_attribute(BARS, 'src')                                                            # drag the overview, then move a slider
        at = tab.locator('.omnilab-packs .all').bounding_box()
        tab.mouse.move(at['x'] + at['width'] / 2, at['y'] + 20); tab.mouse.down(); tab.mouse.up()
        old = changed(tab, old)
        assert int(tab.locator('.omnilab-packs li').first.inner_text()) > 30
        words = tab.inner_text('.omnilab-packs h4')
        tab.locator('.noUi-handle').first.focus()
        tab.keyboard.press('ArrowLeft')
        new = changed(tab, old)
        assert new != first and tab.inner_text('.omnilab-packs h4') != words

        command(tab, 'apputils:change-theme', theme='JupyterLab Dark')
        tab.wait_for_selector('body[data-jp-theme-light=false]', state='attached')
        tab.wait_for_selector('#jupyterlab-splash', state='detached')                                   # it lies over the page, and takes the mouse
        point(tab, .4, 300)
        tip(tab, 'tree')
        assert contrast(tab) > 7
        shot(tab, 'dark')
