"""Two processes train the model that one process trains: same losses, same weights, and they resume to the bit."""
import copy, os, subprocess, sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch import Tensor, nn

STEPS = 6


class Tiny(nn.Module):
    "Tokens and, in some packs only, an image through a vision tower."
    def __init__(self, vocab=30, d=12, dropout=0.):
        super().__init__()
        self.embed, self.vision_tower, self.unused = nn.Embedding(vocab, d), nn.Linear(3, d), nn.Linear(2, 2)
        self.inner, self.drop, self.lm_head = nn.Linear(d, d), nn.Dropout(dropout), nn.Linear(d, vocab, bias=False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    def get_input_embeddings(self): return self.embed
    def get_output_embeddings(self): return self.lm_head
    def forward(self, input_ids, pixels=None, **kw):
        x = self.embed(input_ids)
        if pixels is not None: x = torch.cat([x[:, :1] + self.vision_tower(pixels), x[:, 1:]], 1)
        return SimpleNamespace(logits=self.lm_head(self.drop(self.inner(x).relu())))


class Deep(Tiny):
    "With a list of layers."
    def __init__(self, **kw): super().__init__(**kw); self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4)); self.inner = nn.Sequential(*self.layers)
    def get_decoder(self): return self


@dataclass
class Toy:
    input_ids: Tensor
    source: Tensor
    labels: Tensor
    weight: Tensor
    media: dict
    def model_inputs(self): return {'input_ids': self.input_ids, **self.media}
    def to(self, device): return self


def toy(n):
    g = torch.Generator().manual_seed(n)
    ids, weight = torch.randint(30, (1, n), generator=g), torch.randint(1, 4, (n - 1,), generator=g).float()
    return Toy(ids, torch.arange(n - 1), ids[0, 1:], weight, {'pixels': torch.randn(1, 1, 3, generator=g)} if n % 3 == 0 else {})


class Kinds:
    "Tokens from 15 on are an image's."
    def token_kinds(self): return (torch.arange(30) >= 15).long(), ('text', 'image')


class Keep:
    def __init__(self, stop=None): self.rows, self.stop = [], stop
    def on_step(self, run):
        self.rows.append({k: v for k, v in run.metrics.items() if k != 'time'})
        run.stop = run.step == self.stop


class Turns:
    "Which layers had a gradient, at the end of each step."
    def __init__(self, lisa): self.lisa = lisa
    def on_start(self, run): run.awake = []; self.lisa.on_start(run)
    def on_step(self, run):
        run.awake.append([i for i, m in enumerate(run.model.layers) if m.weight.requires_grad])
        self.lisa.on_step(run)
    def on_close(self, run): self.lisa.on_close(run)


def build(seed, dropout=0., kind=Tiny):
    from omnilab.forest.loader import Loader
    from omnilab.objectives.score import Scorer
    from omnilab.objectives.sft import sft_objective, size
    from omnilab.train.loop import accelerator, prepare
    from omnilab.train.optim import optimizers, schedule
    torch.manual_seed(seed)
    model, acc = kind(dropout=dropout), accelerator(device='cpu')
    packs = [toy(n) for n in range(4, 9)] if kind is Tiny else [toy(n) for n in range(6, 21, 3)]       # with an image in some, or in all
    torch.manual_seed(seed + acc.process_index)         # every process its own dropout; the head runs on 3 rows at a time
    return prepare(Scorer(model, logits=100), optimizers(model, lr=.01, weight_decay=.1), acc, packs[:3:2], turns=kind is Deep,
                   data=Loader(packs, seed=1), objective=sft_objective(Kinds()), size=size,
                   schedule=schedule('cosine', STEPS, 1), steps=STEPS, packs=3)


def sharded():
    "Largest differences of FSDP2's log-probabilities and gradients from those of a whole copy; the head runs in recomputed chunks."
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from omnilab.objectives.score import Scorer
    torch.manual_seed(0)
    model = Tiny()
    whole, parts = Scorer(copy.deepcopy(model), logits=100), Scorer(model, logits=100)
    mesh, packs = init_device_mesh('cpu', (dist.get_world_size(),)), [toy(6), toy(9)]
    fully_shard(parts.model.inner, mesh=mesh); fully_shard(parts, mesh=mesh)
    mine = parts(packs[dist.get_rank()]).logp
    sum(whole(p).logp.sum() for p in packs).backward(); mine.sum().backward()
    gaps = [p.grad.full_tensor() * dist.get_world_size() - q.grad for p, q in zip(parts.parameters(), whole.parameters()) if q.grad is not None]
    return (mine - whole(packs[dist.get_rank()]).logp).abs().max().item(), max(g.abs().max().item() for g in gaps)


def worker(out):
    from omnilab.train.checkpoint import Checkpoint, resume
    from omnilab.train.loop import train
    from omnilab.tune.lisa import Lisa
    result, out = {}, Path(out)
    run = train(build(0), [keep := Keep()])
    result |= {'world': run.accelerator.num_processes, 'rows': keep.rows, 'weights': run.model.state_dict()}
    result['frozen'] = [n for n, p in run.model.named_parameters() if not p.requires_grad]
    result |= {'looks': run.accelerator.ddp_handler.find_unused_parameters}
    lisa = train(build(0, kind=Deep), [keep := Keep(), Turns(Lisa(1, 2))])
    result['lisa'] = {'rows': keep.rows, 'weights': lisa.model.state_dict(), 'awake': lisa.awake}
    straight = train(build(0, .3), [a := Keep()])
    train(build(0, .3), [b := Keep(stop=3), Checkpoint(out.with_suffix('.run'), {})])
    resume(again := build(9, .3), out.with_suffix('.run'), {})
    train(again, [c := Keep()])
    result |= {'straight': a.rows, 'resumed': b.rows + c.rows,
               'equal': all(p.equal(q) for p, q in zip(straight.model.parameters(), again.model.parameters()) if p.requires_grad)}    # others never move
    if run.accelerator.num_processes > 1: result['sharded'] = sharded()
    if run.accelerator.is_main_process: torch.save(result, out)


def launch(n, out):
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), __file__, str(out)]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('ranks')
    return [launch(n, tmp/f'{n}.pt') for n in (1, 2)]


def test_same_losses(results):
    one, two = results
    assert (one['world'], two['world']) == (1, 2)
    assert len(one['rows']) == len(two['rows']) == STEPS
    assert [r['packs'] for r in two['rows']] == [3, 2] * (STEPS // 2)      # a process without a pack of its own keeps company
    for a, b in zip(one['rows'], two['rows']):
        assert a.keys() == b.keys() and {'loss/text', 'loss/image'} <= a.keys()
        assert all(abs(a[k] - b[k]) < 1e-5 for k in a), (a, b)


def test_same_weights(results):
    one, two = results
    for name, w in one['weights'].items(): torch.testing.assert_close(two['weights'][name], w, atol=1e-6, rtol=1e-5)


def test_layers_in_turns(results):
    one, two = (r['lisa'] for r in results)
    assert one['awake'] == two['awake'] and all(len(x) == 1 for x in one['awake']) and len({*map(tuple, one['awake'])}) > 1
    assert all(abs(a[k] - b[k]) < 1e-5 for a, b in zip(one['rows'], two['rows']) for k in a) and len(two['rows']) == STEPS
    for name, w in one['weights'].items(): torch.testing.assert_close(two['weights'][name], w, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('world', [1, 2])
def test_resumes_to_the_bit(results, world):
    r = results[world - 1]
    assert r['straight'] == r['resumed'] and r['equal']


def test_what_no_pack_reaches(results):
    "Frozen, and as it was; the tower that some packs reach is looked for in every step."
    assert results[1]['frozen'] == ['unused.weight', 'unused.bias'] and results[1]['looks'] is True


def test_sharded_scores(results):
    logp, grad = results[1]['sharded']
    assert logp < 1e-6 and grad < 1e-5


if __name__ == '__main__': worker(sys.argv[1])
