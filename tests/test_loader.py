"""What is learned, and in which order, hangs on the seed alone: the same on one process and on two, and after a stop at any step."""
import os, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch import nn

STEPS, PACKS, MAX = 9, 3, 24
KINDS = 'planned', 'mixture', 'stream', 'streams'


class Tiny(nn.Module):
    def __init__(self, vocab=40, d=8, dropout=0.):
        super().__init__()
        self.embed, self.drop, self.lm_head = nn.Embedding(vocab, d), nn.Dropout(dropout), nn.Linear(d, vocab, bias=False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation='forest'))
    def get_input_embeddings(self): return self.embed
    def get_output_embeddings(self): return self.lm_head
    def forward(self, input_ids, **kw):
        from omnilab.forest.attention import WATCH
        WATCH.read = True                                           # as a layer with our attention does
        return SimpleNamespace(logits=self.lm_head(self.drop(self.embed(input_ids))))


def row(i, name):
    "Row i of a dataset: its length and ids say which it is."
    from omnilab.forest.tree import Row
    g = torch.Generator().manual_seed(i + 1000 * len(name))
    n = int(torch.randint(4, 13, (), generator=g))
    return Row(torch.randint(40, (n,), generator=g), torch.arange(n) >= 2, sample=SimpleNamespace(origin=f'{name}:{i}'))


def data(kind, acc):
    from omnilab.forest.bins import pack
    from omnilab.forest.loader import Loader, Mixture, Stream
    from omnilab.forest.tree import forest
    here = dict(seed=3, rank=acc.process_index, world=acc.num_processes)
    def planned(name, n): return pack(forest([row(i, name) for i in range(n)], merge=False), MAX)
    def source(name, n): return lambda start=0, shard=(0, 1): ((i, row(i, name)) for i in range(start, n) if i % shard[1] == shard[0])
    if kind == 'planned': return Loader(planned('a', 40), **here)
    if kind == 'mixture': return Loader(Mixture({'a': planned('a', 40), 'bb': planned('bb', 11)}, {'a': 1, 'bb': 2}), **here)
    sources, weights = ({'': source('a', 70)}, None) if kind == 'stream' else ({'a': source('a', 70), 'bb': source('bb', 40)}, {'a': 2, 'bb': 1})
    return Stream(sources, lambda r: forest([r]), MAX, PACKS, weights, window=6, **here)


class Keep:
    "Losses, and the rows of each pack that this process trained on."
    def __init__(self, stop=None): self.rows, self.packs, self.stop = [], [], stop
    def on_step(self, run):
        self.rows.append({k: v for k, v in run.metrics.items() if k != 'time'})
        run.stop = run.step == self.stop


def build(kind, seed, dropout=0.):
    from omnilab.objectives.score import Scorer
    from omnilab.objectives.sft import sft_objective, size
    from omnilab.train.loop import accelerator, prepare
    from omnilab.train.optim import optimizers, schedule
    torch.manual_seed(seed)
    model, acc = Tiny(dropout=dropout), accelerator(device='cpu')
    torch.manual_seed(seed + acc.process_index)
    run = prepare(Scorer(model), optimizers(model, lr=.01), acc, data=data(kind, acc), objective=sft_objective(), size=size,
                  schedule=schedule('cosine', STEPS, 1), steps=STEPS, packs=PACKS)
    keep, take = Keep(), run.data.take
    def watched(n):
        group = take(n)
        keep.packs.append([None if t is None else [t.name, [r.origin for r in t.handle.rows]] for t in group])
        return group
    run.data.take = watched
    return run, keep


def trained(kind, folder, dropout, stops, old=None):
    "A run straight through that writes a checkpoint each step, and those that go on from the steps of `old`."
    from omnilab.train.checkpoint import Checkpoint, resume
    from omnilab.train.loop import train
    run, straight = build(kind, 0, dropout)
    train(run, [straight, Checkpoint(folder, {}, every=1, keep=0)])
    out = {'rows': straight.rows, 'packs': straight.packs, 'resumed': {}}
    for k in stops:
        one, main = Path(f'{folder}-{k}-{run.accelerator.num_processes}'), run.accelerator.is_main_process
        if main: shutil.copytree(Path(old or folder)/f'step-{k:06}', one/f'step-{k:06}')
        run.accelerator.wait_for_everyone()
        again, keep = build(kind, 9, dropout)
        resume(again, one, {})
        train(again, [keep])
        same = all(p.equal(q) for p, q in zip(run.model.parameters(), again.model.parameters()))
        out['resumed'][k] = {'rows': keep.rows, 'packs': keep.packs, 'same': same}
    return out


def worker(out, old):
    from accelerate.utils import gather_object
    out, result = Path(out), {}
    for kind in KINDS:
        result[kind] = trained(kind, out/f'{kind}-dropout', .2, range(1, STEPS))
        result[f'{kind} plain'] = trained(kind, out/kind, 0., (1, 4, 8) if old else (), f'{old}/{kind}')
    every = gather_object([result])
    if int(os.environ['RANK']) == 0: torch.save(every, out/'result.pt')


def launch(n, out, old):
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), __file__, str(out), str(old)]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out/'result.pt', weights_only=True)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    one, two = tmp_path_factory.mktemp('one'), tmp_path_factory.mktemp('two')
    return {1: launch(1, one, ''), 2: launch(2, two, one)}


def together(parts):
    "What all processes knew of each step's packs."
    return [[next(p for p in known if p is not None) for known in zip(*step)] for step in zip(*parts)]


@pytest.mark.parametrize('kind', KINDS)
def test_same_order(results, kind):
    one, two = (together([r[f'{kind} plain']['packs'] for r in results[n]]) for n in (1, 2))
    assert one == two and len(one) == STEPS


@pytest.mark.parametrize('kind', KINDS)
def test_same_losses(results, kind):
    one, two = (results[n][0][f'{kind} plain']['rows'] for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-5 * (1 + abs(a[k])) for k in a), (a, b)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('world', [1, 2])
def test_goes_on_after_any_step_to_the_bit(results, kind, world):
    for r in results[world]:
        straight, resumed = r[kind], r[kind]['resumed']
        assert sorted(resumed) == list(range(1, STEPS))
        for k, x in resumed.items():
            assert x['rows'] == straight['rows'][k:] and x['packs'] == straight['packs'][k:] and x['same'], (kind, world, k)


@pytest.mark.parametrize('kind', KINDS)
def test_two_go_on_where_one_stopped(results, kind):
    straight = results[1][0][f'{kind} plain']
    for k in (1, 4, 8):
        parts = [r[f'{kind} plain']['resumed'][k] for r in results[2]]
        assert together([p['packs'] for p in parts]) == together([straight['packs'][k:]])
        for a, b in zip(straight['rows'][k:], parts[0]['rows'], strict=True): assert all(abs(a[n] - b[n]) < 1e-5 * (1 + abs(a[n])) for n in a)


def test_a_process_knows_its_own_lanes_only(results):
    for rank, r in enumerate(results[2]):
        assert all([p is None for p in step] == [j % 2 != rank for j in range(PACKS)] for step in r['stream']['packs'])


@pytest.mark.parametrize('kind', ['mixture', 'streams'])
def test_shares_are_exact(results, kind):
    rows, names = results[1][0][f'{kind} plain']['rows'], [n for step in together([results[1][0][f'{kind} plain']['packs']]) for n, _ in step]
    if kind == 'streams': assert names.count('a') == 2 * names.count('bb') == 18
    else:                                                           # an epoch has as many packs as there are, of which two thirds are bb's
        loader = data(kind, SimpleNamespace(process_index=0, num_processes=1))
        epoch, (a, bb) = names[:len(loader)], loader.counts
        assert (epoch.count('a'), epoch.count('bb')) == (a, bb) and a + bb == len(loader.packs) < len(names) and bb - 1 < 2 * a < bb + 3
    for m in rows:
        assert abs(m['share/a'] + m['share/bb'] - 1) < 1e-9
        assert {n for n in ('a', 'bb') if m[f'share/{n}']} == {n for n in ('a', 'bb') if f'loss/{n}' in m}


if __name__ == '__main__': worker(*sys.argv[1:])
