"Every notebook runs from its top, in a process of its own."
import json, os, subprocess, sys
from pathlib import Path

import pytest
from conftest import FLAGS, NOTEBOOKS, ROOT, environment, name, run

CODE = '''
import json, sys
from nbdev.test import test_nb
path, skip, seconds = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
sys.exit(not test_nb(path, skip_flags=skip, cell_timeout=seconds)[0])
'''


@pytest.fixture(scope='module')
def server():
    "A process that has imported the libraries and forks for each notebook."
    if not hasattr(os, 'fork'): yield None; return
    process = subprocess.Popen([sys.executable, Path(__file__).parent/'notebook_server.py'], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    yield process
    process.stdin.close(); process.wait()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebook(path, request, record_property, tmp_path, server):
    asked = [f for f in FLAGS if request.config.getoption(f'--run-{f}')]
    skip, seconds = [f for f in FLAGS if f not in asked], 3600 if asked else 300
    env = {'OMNILAB_PATHS_RUNS': str(tmp_path), 'OMNILAB_PATHS_CACHE': str(tmp_path/'cache'), 'HF_HUB_OFFLINE': '0' if 'network' in asked else '1'}
    afresh = asked or 'sys.modules' in path.read_text()          # what is imported when is what such a notebook is about
    if server and not afresh:
        out = tmp_path/'out.txt'
        told = dict(path=str(path), skip=skip, seconds=seconds, env=environment(**env), cwd=str(ROOT), out=str(out))
        server.stdin.write(json.dumps(told) + '\n'); server.stdin.flush()
        (code, cpu), text = json.loads(server.stdout.readline()), out.read_text()
    else:
        done, cpu = run(['-c', CODE, path, json.dumps(skip), seconds], **env)
        code, text = done.returncode, f'{done.stdout[-2000:]}\n{done.stderr}'
    record_property('cpu', round(cpu, 1))
    ran = code == 0
    assert ran, f'{name(path)}\n{text[-8000:]}'
