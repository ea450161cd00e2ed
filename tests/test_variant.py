"Runs with changed cells: they train with them, keep them, are refused other ones on resume, and start again anywhere from their own folder."
import os, subprocess, sys

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from omnilab.variant import ACTIVE, applied, found, pieces, source_of, variant

STILL = '''
def schedule(name, total, warmup=0, decay=.2, floor=0.):
    "Nothing moves."
    return lambda step: 0.
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from omnilab.data.world.write import write
    tmp = tmp_path_factory.mktemp('variant')
    path = write(tmp/'rows', 6, tasks=['color', 'tones'])
    if path.name != 'train.jsonl': path.rename(tmp/'rows'/'train.jsonl')
    return tmp


def recipe(folder, name, variants=(), **data):
    from omnilab.train.recipe import SFTRecipe
    r = SFTRecipe(output=str(folder/name), variants=[str(v) for v in variants])
    r.model.dtype, r.data.train, r.data.cache = 'float32', str(folder/'rows'/'train.jsonl'), False
    for k, v in dict(device='cpu', max_length=512, steps=2, lr=.01, tracker='none').items(): setattr(r.train, k, v)
    for k, v in data.items(): setattr(r.data, k, v)
    return r


def adapter(folder): return load_file(folder/'adapter'/'adapter_model.safetensors')


def moved(folder): return any('lora_B' in k and v.any() for k, v in adapter(folder).items())


@pytest.fixture(scope='module')
def runs(folder):
    from omnilab.train.sft import run
    still = variant('still', STILL, 'omnilab.train.optim').save(folder)
    for name, cells in (('plain', []), ('still', [still])): run(recipe(folder, name, cells))
    return folder


def test_a_run_trains_with_the_changed_cell(runs):
    "A schedule that is always zero: the matrices that begin at zero stay there."
    assert moved(runs/'plain') and not moved(runs/'still') and ACTIVE == []


def test_a_run_keeps_its_cells(runs):
    from omnilab.train.recipe import SFTRecipe, from_args
    kept = runs/'still'/'variants'/'still.py'
    assert from_args(SFTRecipe, [str(runs/'still'/'recipe.yaml')]).variants == [str(kept)]
    assert found(str(kept)).source.strip() == STILL.strip() and '+    "Nothing moves."' in kept.with_suffix('.diff').read_text()
    assert 'Nothing moves.' in (runs/'still'/'report.html').read_text() and 'Cells that were changed' not in (runs/'plain'/'report.html').read_text()


def test_two_runs_show_the_cells_that_differ(runs):
    from omnilab.train.compare import Compared, differences
    html = Compared(runs/'plain', runs/'still')._repr_html_()
    assert 'Cells of still' in html and 'Nothing moves.' in html and 'As they are exported.' in html
    assert differences([runs/'plain', runs/'still']) == {}


def test_another_cell_is_another_run(runs):
    from omnilab.train.sft import run
    other = variant('still', STILL.replace('0.', '.5'), 'omnilab.train.optim').save(runs/'other')
    with pytest.raises(ValueError, match='variants'): run(recipe(runs, 'still', [other]))
    with pytest.raises(ValueError, match='variant nobody: no file'): run(recipe(runs, 'nobody', ['nobody']))
    assert ACTIVE == []


@pytest.mark.slow
def test_processes_that_encode_have_it_too(folder):
    from omnilab.train.feed import read_files, plan_packs
    from omnilab.train.model import load_model
    text = pieces(source_of('omnilab.forest.encode'))['encode']
    first = next(l for l in text.splitlines() if l.startswith('    "'))
    broken = variant('broken', text.replace(first, f'{first}\n    raise EncodeError(sample, "from the variant")'), 'omnilab.forest.encode')
    r = recipe(folder, 'none', workers=1, on_error='skip', cache=True)
    with applied([broken]):
        try: told = ' '.join(map(str, plan_packs(read_files(r), load_model(r), r, lambda rows, *_: rows).problems))
        except ValueError as e: told = str(e)
    assert 'from the variant' in told


@pytest.mark.slow
def test_the_runs_own_recipe_starts_it_again_on_two_processes(runs):
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT)}
    words = ['-m', 'torch.distributed.run', '--nproc-per-node', '2', '-m', 'omnilab.train.sft', str(runs/'still'/'recipe.yaml')]
    words += ['--output', str(runs/'again'), '--train.packs', '2']
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not moved(runs/'again') and (runs/'again'/'variants'/'still.diff').exists()
