"The configurations for real, through the command's own path: several processes on CPUs, and weights divided by FSDP2, end as one process does."
import os, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(Path(__file__).parents[1])}


def divided():
    "Accelerate as it is under its FSDP2 configuration; on CPUs it has to be told, for it looks for a card first."
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from omnilab.train import loop
    from omnilab.train.launch import CONFIGS
    plain = loop.accelerator
    os.environ.update({k.upper(): str(v) for k, v in CONFIGS['fsdp2']['fsdp_config'].items()})      # as its launcher says it

    def accelerator(*args):
        acc = plain(*args)
        AcceleratorState._shared_state['fsdp_plugin'] = FullyShardedDataParallelPlugin()
        for state in (AcceleratorState, PartialState): state._shared_state['distributed_type'] = DistributedType.FSDP
        return acc
    loop.accelerator = accelerator


def recipe(folder, name, **train):
    from omnilab.train.recipe import SFTRecipe
    r = SFTRecipe(output=str(folder/name))
    r.model.dtype, r.data.train, r.data.cache = 'float32', str(folder/'rows'/'train.jsonl'), False
    for k, v in (dict(device='cpu', max_length=192, packs=3, steps=4, lr=.01, tracker='none', save_every=2, ema=.5) | train).items(): setattr(r.train, k, v)
    return r


class Stop:
    def on_step(self, run): run.stop = run.step == 2


def worker(folder):
    "A run in two pieces with divided weights, of adapters and of everything."
    from omnilab.train.sft import run
    divided()
    for kind in ('lora', 'none'):
        r = recipe(Path(folder), f'fsdp2-{kind}')
        r.adapter.kind = kind
        done = run(r, [Stop()])
        assert done.run.step == 2 and any(type(p).__name__ == 'DTensor' for p in done.run.model.parameters())
        assert run(r).run.step == 4


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from omnilab.data.world.write import write
    from omnilab.train.recipe import to_yaml
    tmp = tmp_path_factory.mktemp('launch')
    path = write(tmp/'rows', 10, tasks=['color', 'tones', 'motion'])
    path.rename(tmp/'rows'/'train.jsonl') if path.name != 'train.jsonl' else None
    for name, kind in (('cpu-lora', 'lora'), ('cpu-none', 'none'), ('cpus-lora', 'lora')):
        r = recipe(tmp, name)
        r.adapter.kind = kind
        (tmp/f'{name}.yaml').write_text(to_yaml(r))
        cmd = [sys.executable, '-m', 'omnilab.cli', 'launch', name.split('-')[0], str(tmp/f'{name}.yaml')]
        done = subprocess.run(cmd, env=ENV, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, str(tmp)]
    done = subprocess.run(cmd, env={**ENV, 'ACCELERATE_USE_CPU': 'true'}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return tmp


def test_accelerate_itself_starts():
    "The line of the README: nothing that is installed beside it may break Accelerate's own command."
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--help'], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and '--config_file' in done.stdout, done.stderr[-500:]


@pytest.mark.parametrize('machine, kind', [('cpus', 'lora'), ('fsdp2', 'lora'), ('fsdp2', 'none')])
def test_as_one_process(folder, machine, kind):
    from omnilab.train.callbacks import read_metrics
    one, many = ([m for m in read_metrics(folder/f'{x}-{kind}'/'metrics.jsonl') if m['step']] for x in ('cpu', machine))
    assert [m['step'] for m in one] == [m['step'] for m in many] == [1, 2, 3, 4]
    for a, b in zip(one, many):
        assert a['packs'] == b['packs'] and all(abs(a[k] - b[k]) < 2e-4 * (1 + abs(a[k])) for k in ('loss', 'grad_norm')), (a, b)
    a, b = (load_file(folder/f'{x}-{kind}'/'model'/'model.safetensors') for x in ('cpu', machine))
    assert a.keys() == b.keys()
    for n in a: torch.testing.assert_close(b[n], a[n], atol=1e-3, rtol=1e-3, msg=n)


if __name__ == '__main__': worker(sys.argv[1])
