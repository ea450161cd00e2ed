"""A run that is killed with -9 again and again ends as the run that was never stopped: metrics and weights to the bit."""
import os, random, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch import Tensor, nn

STEPS, KILLS = 40, 3


class Tiny(nn.Module):
    def __init__(self, vocab=30, d=12):
        super().__init__()
        self.embed, self.inner, self.norm = nn.Embedding(vocab, d), nn.Linear(d, d), nn.BatchNorm1d(d)      # its running mean is a buffer
        self.drop, self.lm_head = nn.Dropout(.3), nn.Linear(d, vocab, bias=False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    def get_input_embeddings(self): return self.embed
    def get_output_embeddings(self): return self.lm_head
    def forward(self, input_ids, **kw):
        return SimpleNamespace(logits=self.lm_head(self.drop(self.norm(self.inner(self.embed(input_ids))[0])[None].relu())))


@dataclass
class Toy:
    input_ids: Tensor
    source: Tensor
    labels: Tensor
    weight: Tensor
    def model_inputs(self): return {'input_ids': self.input_ids}
    def to(self, device): return self


def toy(n):
    ids = torch.randint(30, (1, n), generator=torch.Generator().manual_seed(n))
    return Toy(ids, torch.arange(n - 1), ids[0, 1:], torch.ones(n - 1))


class Slow:
    "Time for a kill to hit anything: a step, the metrics, a checkpoint."
    def on_step(self, run): time.sleep(.01)


def worker(folder):
    from omnilab.forest.loader import Loader
    from omnilab.objectives.score import Scorer
    from omnilab.objectives.sft import sft_objective, size
    from omnilab.train.callbacks import MetricsFile
    from omnilab.train.checkpoint import Checkpoint, resume
    from omnilab.train.loop import accelerator, prepare, train
    from omnilab.train.optim import optimizers, schedule
    folder, recipe = Path(folder), {'seed': 0}
    torch.manual_seed(0)
    net = Tiny()
    run = prepare(Scorer(net), optimizers(net, 'muon', lr=.01, weight_decay=.1), accelerator(device='cpu'), data=Loader([toy(n) for n in range(4, 9)]),
                  objective=sft_objective(), size=size, schedule=schedule('wsd', STEPS, 3), steps=STEPS, packs=2)
    resume(run, folder/'checkpoints', recipe)
    print('from', run.step, flush=True)
    train(run, [MetricsFile(folder/'metrics.jsonl'), Slow(), Checkpoint(folder/'checkpoints', recipe, every=1, keep=2)])
    torch.save(net.state_dict(), folder/'end.pt')


def start(folder):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, __file__, str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(folder):
    path = folder/'metrics.jsonl'
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    straight, killed = tmp_path_factory.mktemp('straight'), tmp_path_factory.mktemp('killed')
    out, err = (p := start(straight)).communicate(timeout=120)
    assert p.returncode == 0, err
    rng, begun = random.Random(0), []
    for k in range(KILLS):
        stop, p, patience = rng.randint(2, 11) + 10 * k, start(killed), time.time() + 120
        while p.poll() is None and lines(killed) < stop and time.time() < patience: time.sleep(.002)
        time.sleep(rng.random() * .02)
        p.send_signal(signal.SIGKILL)
        begun.append(p.communicate()[0])
    out, err = (p := start(killed)).communicate(timeout=120)
    assert p.returncode == 0, err
    return straight, killed, [*begun, out]


def test_it_was_killed_and_resumed(runs):
    begun = [int(b.split()[1]) for b in runs[2] if b]
    assert begun[0] == 0 and 0 < begun[-1] < STEPS and begun == sorted(begun), begun


def test_metrics_are_those_of_the_uninterrupted_run(runs):
    from omnilab.train.callbacks import read_metrics, repeatable
    a, b = ([repeatable(r) for r in read_metrics(folder/'metrics.jsonl')] for folder in runs[:2])
    assert [r['step'] for r in b] == list(range(1, STEPS + 1))
    assert a == b


def test_weights_are_those_of_the_uninterrupted_run(runs):
    a, b = (torch.load(folder/'end.pt', weights_only=True) for folder in runs[:2])
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_no_half_checkpoints_stay(runs):
    assert sorted(p.name for p in (runs[1]/'checkpoints').iterdir()) == [f'step-{STEPS - 1:06}', f'step-{STEPS:06}']


if __name__ == '__main__': worker(sys.argv[1])
