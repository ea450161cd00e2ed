"What a recipe turns on, through the command's own path: averages, noise, an early end, layers computed again; stopped, gone on with, and saved."
import json
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file

ON = dict(ema=.5, neftune=5., patience=9, eval_every=2, checkpointing=True, offload=True, save_every=2)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    from omnilab.data.world.write import write
    tmp = tmp_path_factory.mktemp('tricks')
    return tmp, write(tmp/'train', 6, tasks=['color', 'count'], share=2), write(tmp/'test', 2, 'test', tasks=['color'])


def recipe(world, name, **train):
    from omnilab.train.recipe import SFTRecipe
    tmp, rows, test = world
    r = SFTRecipe(output=str(tmp/name))
    r.model.dtype, r.data.train, r.data.test, r.data.cache, r.data.max_new_tokens = 'float32', str(rows), str(test), False, 4
    for k, v in (dict(device='cpu', max_length=256, steps=5, lr=.01, tracker='none') | train).items(): setattr(r.train, k, v)
    return r


class Stop:
    def __init__(self, at): self.at = at
    def on_step(self, run): run.stop = run.step == self.at


def sft(recipe, *more):
    from omnilab.train.callbacks import read_metrics, repeatable
    from omnilab.train.sft import run
    with redirect_stderr(StringIO()): done = run(recipe, more)
    return done, [repeatable(m) for m in read_metrics(done.folder/'metrics.jsonl')]


@pytest.fixture(scope='module')
def straight(world): return sft(recipe(world, 'straight', **ON))


def test_resumes_to_the_bit(world, straight):
    sft(recipe(world, 'cut', **ON), Stop(2))
    done, rows = sft(recipe(world, 'cut', **ON))
    whole = {m['step']: m['loss'] for m in straight[1] if m['step']}
    assert {m['step']: m['loss'] for m in rows if m['step']} == whole and len(whole) == 5
    a, b = (load_file(d.folder/'adapter'/'adapter_model.safetensors') for d in (done, straight[0]))
    assert a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)


def test_saves_the_average(straight):
    folder = straight[0].folder
    kept = torch.load(folder/'checkpoints'/'step-000005'/'state.pt', weights_only=True)['kept']
    weights, saved = load_file(folder/'checkpoints'/'step-000005'/'weights.safetensors'), load_file(folder/'adapter'/'adapter_model.safetensors')
    for n, mean in kept['ema'].items():
        name = n.replace('.default', '')
        assert saved[name].equal(mean)
    assert any(not mean.equal(weights[n]) for n, mean in kept['ema'].items())       # adapters of the tower for sounds never move here


def test_evaluates_the_average_by_choice(world, straight):
    _, rows = sft(recipe(world, 'weights', **ON | dict(ema_for='model')))
    a, b = ([m['test/loss'] for m in r if 'test/loss' in m] for r in (straight[1], rows))
    assert a[0] == b[0] and all(x != y for x, y in zip(a[1:], b[1:]))               # the same at the start, and not later
    assert [m['loss'] for m in straight[1][1:]] == [m['loss'] for m in rows[1:]]    # of training


def test_noise_is_for_training(world, straight):
    _, rows = sft(recipe(world, 'calm', **ON | dict(neftune=0.)))
    assert rows[0] == straight[1][0] and rows[1]['loss'] != straight[1][1]['loss']


def test_ends_early(world):
    done, rows = sft(recipe(world, 'early', **ON | dict(patience=1, lr=0., ema=0.)))
    assert done.run.step == 2 and json.loads((done.folder/'metrics.jsonl').read_text().splitlines()[-1])['step'] == 2
    assert sft(recipe(world, 'early', **ON | dict(patience=1, lr=0., ema=0.)))[0].run.step == 2


@pytest.mark.parametrize('wrong, said', [(dict(patience=1, eval_every=0), 'expected train.eval_every'),
                                         (dict(patience=1, eval_every=2), 'expected rows in data.test'),
                                         (dict(patience=1, eval_every=2, watch='min test/los'), "train.watch = 'min test/los'")])
def test_one_line(world, capsys, wrong, said):
    from omnilab.train.recipe import to_yaml
    from omnilab.train.sft import main
    r = recipe(world, 'wrong', **wrong)
    if 'data.test' in said: r.data.test = ''
    (world[0]/'wrong.yaml').write_text(to_yaml(r))
    with pytest.raises(SystemExit) as e: main([str(world[0]/'wrong.yaml')], 'omnilab sft')
    lines = [l for l in capsys.readouterr().err.splitlines() if l.startswith('omnilab sft:')]
    assert e.value.code == 2 and len(lines) == 1 and said in lines[0]
