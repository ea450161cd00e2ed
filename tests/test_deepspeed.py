"ZeRO for real: two processes on CPUs, stopped and resumed, end as one process does."
import json, os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not find_spec('deepspeed'), reason="needs deepspeed (pip install 'omnilab[deepspeed]')")
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': os.pathsep.join(map(str, [
    Path(__file__).parents[1], *filter(None, [os.environ.get('PYTHONPATH')])]))}
PARAMS = [('3', 'none'), *(pytest.param(*p, marks=pytest.mark.slow) for p in (('2', 'none'), ('2', 'lora'), ('3', 'lora')))]


def told():
    "Accelerate as it is under DeepSpeed; on CPUs it has to be told, for it looks for a card first."
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False      # nothing is compiled: gloo will do
    from omnilab.train.zero import Zero
    PartialState._prepare_backend = lambda *args, **kw: ('gloo', DistributedType.NO)
    plain = Zero.settle

    def settle(self, scorer):
        self.deepspeed_plugin.deepspeed_config['zero_optimization']['stage3_param_persistence_threshold'] = 0     # small weights are divided, too
        return plain(self, scorer)
    Zero.settle = settle


def recipe(folder, name, kind, **train):
    from omnilab.train.recipe import SFTRecipe
    r = SFTRecipe(output=str(folder/name))
    r.adapter.kind, r.model.dtype, r.data.train, r.data.cache = kind, 'float32', str(folder/'rows.jsonl'), False
    told = dict(max_length=128, packs=3, steps=4, lr=.002, lr_scale={'vision': .5}, weight_decay=.1, tracker='none', save_every=2, freeze=('audio',))
    for k, v in (told | train).items(): setattr(r.train, k, v)
    return r


class Stop:
    def on_step(self, run): run.stop = run.step == 2


def worker(folder, stage, kind):
    "A run in one piece and one in two."
    from omnilab.train.sft import run
    told()
    for name, stops in (('whole', [[]]), ('pieces', [[Stop()], []])):
        r = recipe(Path(folder), f'zero{stage}-{kind}-{name}', kind)
        for stop in stops: done = run(r, stop)
        assert done.run.step == 4 and type(done.run.scorer).__name__ == 'DeepSpeedEngine'
        shares, model = done.run.optimizers[0], done.model
        size = lambda p: p.ds_numel if stage == '3' else p.numel()
        assert sum(row.numel() for row in shares.rows) < .6 * sum(map(size, shares.params))
        assert stage == '2' or sum(p.ds_tensor.numel() for p in model.parameters()) < .6 * sum(map(size, model.parameters()))
        assert stage == '2' or any(p.numel() == 0 for p in model.parameters()) and not any(p.ds_persist for p in model.parameters())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from omnilab.data.world.write import write
    from omnilab.train.launch import config
    tmp = tmp_path_factory.mktemp('zero')
    rows = [json.loads(line) for line in write(tmp, 10, tasks=['color', 'tones', 'motion']).read_text().splitlines()]
    for m in (m for r in rows for m in r['messages'] if m['role'] == 'assistant'): m['content'] = m['content'][::-1]     # what the model doesn't know
    (tmp/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    for stage in '23': (tmp/f'{stage}.yaml').write_text(yaml.safe_dump(config(f'zero{stage}', 2)))
    return tmp


def spent(folder, *names):
    from omnilab.train.callbacks import read_metrics
    return [[m for m in read_metrics(folder/n/'metrics.jsonl') if m['step']] for n in names]


@pytest.mark.parametrize('stage, kind', PARAMS)
def test_as_one_process(folder, stage, kind):
    from omnilab.train.sft import run
    run(one := recipe(folder, f'one-{stage}-{kind}', kind, device='cpu'))
    start = 'import omnilab; from accelerate.commands.launch import main; main()'
    cmd = [sys.executable, '-c', start, '--config_file', folder/f'{stage}.yaml', '--main_process_port', '0', __file__, folder, stage, kind]
    done = subprocess.run([*map(str, cmd)], env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    names = Path(one.output).name, f'zero{stage}-{kind}-whole', f'zero{stage}-{kind}-pieces'
    alone, whole, pieces = spent(folder, *names)
    assert len(alone) == len(whole) == len(pieces) == 4 and all(m['grad_norm'] > 1 for m in alone)        # so each step was clipped
    for a, b, c in zip(alone, whole, pieces):
        assert {k: v for k, v in b.items() if k != 'time'} == {k: v for k, v in c.items() if k != 'time'}
        assert a['packs'] == b['packs'] == 3 and a['lr'] == b['lr']
        assert all(abs(a[k] - b[k]) < 1e-4 * (1 + abs(a[k])) for k in ('loss', 'grad_norm')), (a, b)
    a, b, c = (load_file(folder/n/'model'/'model.safetensors') for n in names)
    assert a.keys() == b.keys() == c.keys()
    for n in a:
        torch.testing.assert_close(b[n], a[n], atol=1e-3, rtol=1e-3, msg=n)
        assert torch.equal(b[n], c[n]), n


if __name__ == '__main__': worker(*sys.argv[1:])
