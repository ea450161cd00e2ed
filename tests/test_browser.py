"The browser of data sets in JupyterLab, driven by a browser: filters, a choice, its card and its row."
import pytest
from test_inspector import CHROMIUM, command, jupyterlab, notebook, page, shot

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='needs a Chromium')]

SHOW = "from omnilab.data.browser import Browser\nlook = Browser('audio')\nlook"
NAMES = "() => [...document.querySelectorAll('.jp-OutputArea select[multiple] option, .jp-OutputArea select[size] option')].map(o => o.textContent)"


def test_browser(tmp_path):
    pytest.importorskip('playwright')
    from omnilab.data.cards import cards
    listed = lambda *what: [c.name for c in cards(*what)]
    (tmp_path/'look.ipynb').write_text(notebook(SHOW))
    with jupyterlab(tmp_path) as address, page(address) as tab:
        tab.wait_for_selector('.jp-KernelName:has-text("Python 3"), .jp-Toolbar-kernelName:has-text("Python 3")')
        tab.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]')
        command(tab, 'notebook:run-all-cells')
        tab.wait_for_selector('.jp-OutputArea >> text=its row as a sample')
        assert tab.evaluate(NAMES) == listed('audio')

        tab.locator('.widget-dropdown:has-text("task") select').select_option('speak')
        tab.wait_for_function(f'n => ({NAMES})().length === n', arg=len(listed('audio', 'speak')))
        assert tab.evaluate(NAMES) == listed('audio', 'speak')

        tab.locator('.jp-OutputArea select[size]').select_option('vctk')
        tab.wait_for_selector('.jp-OutputArea b:text-is("vctk")')
        tab.wait_for_selector('.jp-OutputArea audio')                        # what is to be spoken, as a player
        shot(tab, 'browser')
