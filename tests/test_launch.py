"The configurations for real, through the command's own path: several processes on CPUs, and weights divided by FSDP2, end as one process does."
import json, os, subprocess, sys
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


SMALL = 'galore', 'qgalore', 'apollo'


def recipe(folder, name, kind, **train):
    from omnilab.train.recipe import SFTRecipe
    r = SFTRecipe(output=str(folder/name))
    r.model.dtype, r.data.train, r.data.cache = 'float32', str(folder/'rows'/'train.jsonl'), False
    for k, v in (dict(device='cpu', max_length=192, packs=3, steps=4, lr=.01, tracker='none', save_every=2, ema=.5) | train).items(): setattr(r.train, k, v)
    r.adapter.kind = 'none' if kind in SMALL else kind
    if kind not in SMALL: r.data.test, r.data.eval_rows, r.data.max_new_tokens, r.train.eval_every = r.data.train, 1, 2, 2
    if kind in SMALL: r.train.optimizer, r.train.lr, r.galore.rank, r.galore.every = kind, 1e-3, 4, 2
    return r


class Stop:
    def on_step(self, run): run.stop = run.step == 2


def worker(folder, machine, *kinds):
    "A run in two pieces on some machine; where weights are divided and moments small, in one piece, too."
    from omnilab.train.sft import run
    if machine == 'fsdp2': divided()
    for kind in kinds:
        r = recipe(Path(folder), f'{machine}-{kind}', kind)
        done = run(r, [Stop()])
        assert done.run.step == 2 and any(type(p).__name__ == 'DTensor' for p in done.run.model.parameters()) == (machine == 'fsdp2')
        assert run(r).run.step == 4
        if kind in SMALL and machine == 'fsdp2': run(recipe(Path(folder), f'{machine}-{kind}-straight', kind))


def processes(folder, machine, *kinds):
    "The worker, on as many processes as the machine has."
    cmd = [sys.executable, *(['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'] if machine != 'cpu' else []), __file__, str(folder)]
    done = subprocess.run([*cmd, machine, *kinds], env={**ENV, 'ACCELERATE_USE_CPU': 'true'}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from omnilab.data.world.write import write
    from omnilab.train.recipe import to_yaml
    tmp = tmp_path_factory.mktemp('launch')
    path = write(tmp/'rows', 10, tasks=['color', 'tones', 'motion'])
    path.rename(tmp/'rows'/'train.jsonl') if path.name != 'train.jsonl' else None
    for name, kind in (('cpu-lora', 'lora'), ('cpu-none', 'none'), ('cpus-lora', 'lora')):
        r = recipe(tmp, name, kind)
        (tmp/f'{name}.yaml').write_text(to_yaml(r))
        cmd = [sys.executable, '-m', 'omnilab.cli', 'launch', name.split('-')[0], str(tmp/f'{name}.yaml')]
        done = subprocess.run(cmd, env=ENV, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
    processes(tmp, 'fsdp2', 'lora', 'none')
    return tmp


def test_accelerate_itself_starts():
    "The line of the README: nothing that is installed beside it may break Accelerate's own command."
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--help'], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and '--config_file' in done.stdout, done.stderr[-500:]


def weights(folder, name): return load_file(folder/name/'model'/'model.safetensors')


def metrics(folder, name):
    from omnilab.train.callbacks import read_metrics
    return read_metrics(folder/name/'metrics.jsonl')


def same_steps(folder, one, many, tolerance=2e-4):
    one, many = ([m for m in metrics(folder, x) if m['step']] for x in (one, many))
    assert [m['step'] for m in one] == [m['step'] for m in many] == [1, 2, 3, 4]
    for a, b in zip(one, many):
        told = ['loss', 'grad_norm', *(k for k in a if k.startswith('test/'))]
        assert a['packs'] == b['packs'] and all(abs(a[k] - b[k]) < tolerance * (1 + abs(a[k])) for k in told), (a, b)


@pytest.mark.parametrize('machine, kind', [('cpus', 'lora'), ('fsdp2', 'lora'), ('fsdp2', 'none')])
def test_as_one_process(folder, machine, kind):
    same_steps(folder, f'cpu-{kind}', f'{machine}-{kind}')
    if machine == 'fsdp2': assert 'test/loss' in metrics(folder, f'fsdp2-{kind}')[-1] and not (folder/f'fsdp2-{kind}'/'answers').exists()
    a, b = (weights(folder, f'{x}-{kind}') for x in ('cpu', machine))
    assert a.keys() == b.keys()
    for n in a: torch.testing.assert_close(b[n], a[n], atol=1e-3, rtol=1e-3, msg=n)


@pytest.fixture(scope='module')
def unlearned(tmp_path_factory):
    "Rows that the model answers wrongly, learned by one process. Of what it knows the gradient is nearly nothing, and its directions are rounding."
    from omnilab.data.world.write import write
    tmp = tmp_path_factory.mktemp('unlearned')
    rows = [json.loads(l) for l in write(tmp/'rows', 10, tasks=['color', 'tones', 'motion']).read_text().splitlines()]
    for m in (m for r in rows for m in r['messages'] if m['role'] == 'assistant'): m['content'] = m['content'][::-1]
    (tmp/'rows'/'train.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    processes(tmp, 'cpu', *SMALL)
    return tmp


@pytest.mark.slow
@pytest.mark.parametrize('machine', ['cpus', 'fsdp2'])
def test_small_moments_as_one_process(unlearned, machine):
    "Steps by what they do, the loss: of directions as strong as each other, or weaker than rounding, any are right, and last bits choose."
    folder = unlearned
    processes(folder, machine, *SMALL)
    for kind in SMALL:
        same_steps(folder, f'cpu-{kind}', f'{machine}-{kind}', .05 if kind == 'qgalore' else 2e-4)      # which rounds its directions to 16 levels
        assert weights(folder, f'cpu-{kind}').keys() == (halves := weights(folder, f'{machine}-{kind}')).keys()
        if machine == 'cpus': continue
        straight = weights(folder, f'{machine}-{kind}-straight')
        assert all(halves[n].equal(straight[n]) for n in straight), kind                                # stopped, written, resumed: the same bits


if __name__ == '__main__': worker(*sys.argv[1:])
