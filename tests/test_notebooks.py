"Every notebook runs from its top in a fresh process."
import pytest
from conftest import FLAGS, NOTEBOOKS, name, run

CODE = '''
import json, sys
from nbdev.test import test_nb
path, skip, seconds = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
sys.exit(not test_nb(path, skip_flags=skip, cell_timeout=seconds)[0])
'''


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebook(path, request, record_property, tmp_path):
    asked = [f for f in FLAGS if request.config.getoption(f'--run-{f}')]
    skip = '[' + ', '.join(f'"{f}"' for f in FLAGS if f not in asked) + ']'
    env = {'OMNILAB_PATHS_RUNS': str(tmp_path), 'OMNILAB_PATHS_CACHE': str(tmp_path/'cache'), 'HF_HUB_OFFLINE': '0' if 'network' in asked else '1'}
    done, cpu = run(['-c', CODE, path, skip, 3600 if asked else 300], **env)
    record_property('cpu', round(cpu, 1))
    ran = done.returncode == 0
    assert ran, f'{name(path)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}'
