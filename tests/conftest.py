"Flags that stay off unless asked for, and what each test cost in CPU seconds, told at the end."
import atexit, os, re, resource, shutil, subprocess, sys, tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not re.search(r'/[._]', str(p.relative_to(ROOT.parent))))
FLAGS = 'slow', 'gpu', 'network'
if 'OMNILAB_PATHS_CACHE' not in os.environ:     # no test reads what another session encoded
    os.environ['OMNILAB_PATHS_CACHE'] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ['OMNILAB_PATHS_CACHE'], ignore_errors=True)
BUDGET = 20     # CPU seconds of one notebook
SHOWN = 40      # the costliest tests


def name(path): return str(path.relative_to(ROOT/'nbs').with_suffix(''))


def environment(**env):
    "That of a process that can't reach the network by accident or another run's folders."
    keep = {k: v for k, v in os.environ.items() if not k.startswith('OMNILAB_')}
    return {**keep, 'MPLBACKEND': 'agg', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'OMNILAB_PATHS_CACHE': os.environ['OMNILAB_PATHS_CACHE'], **env}


def used(*who): # CPU seconds so far; of this process and those it waited for
    return sum(sum(resource.getrusage(w)[:2]) for w in who or (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def run(args, cwd=ROOT, **env):
    "A fresh process, and its CPU seconds."
    before = used(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment(**env), capture_output=True, text=True)
    return done, used(resource.RUSAGE_CHILDREN) - before


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.began = used()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try: return (yield)
    finally:
        if 'cpu' not in dict(item.user_properties): item.user_properties.append(('cpu', round(used() - item.began, 1)))


def pytest_addoption(parser):
    for flag in FLAGS: parser.addoption(f'--run-{flag}', action='store_true', help=f'run what is flagged {flag}, too')


def pytest_collection_modifyitems(config, items):
    for item in items:
        for flag in FLAGS:
            if item.get_closest_marker(flag) and not config.getoption(f'--run-{flag}'): item.add_marker(pytest.mark.skip(reason=f'needs --run-{flag}'))


def pytest_terminal_summary(terminalreporter, config):
    reports = [r for kind in ('passed', 'failed') for r in terminalreporter.stats.get(kind, []) if getattr(r, 'when', '') == 'call']
    spent = sorted(((dict(r.user_properties)['cpu'], r.nodeid) for r in reports if 'cpu' in dict(r.user_properties)), reverse=True)
    if not spent: return
    books = [(s, n) for s, n in spent if 'test_notebook[' in n]
    terminalreporter.section('CPU seconds')
    for s, n in spent[:SHOWN]: terminalreporter.line(f'{s:7.1f}  {n}')
    for kind, some in ((f'{len(books)} notebooks', books), ('the rest', [o for o in spent if o not in books])):
        terminalreporter.line(f'{sum(s for s, _ in some):7.1f}  {kind}')
    for s, n in books:
        if s > BUDGET and not config.getoption('--run-slow'):
            terminalreporter.line(f'over the budget of {BUDGET} CPU seconds: {n}; make it cheaper, or flag cells #| slow', yellow=True)
