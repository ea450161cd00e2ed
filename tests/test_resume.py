"""A run that is killed with -9 again and again ends as the run that was never stopped; what else goes wrong ends with a line and a whole checkpoint."""
import errno, json, os, random, signal, subprocess, sys, time
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


# --- the real thing: `omnilab sft`, killed while it starts, anywhere, and while it writes

def test_the_benchmark_in_small():
    done = subprocess.run([sys.executable, '-m', 'omnilab.bench.resume', '--quick'], capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).resolve().parents[1])})
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last['kills'], last['identical'], last['differs']) == (3, True, []) and last['writing'] >= 1 and 0 < last['checkpoint_share'] < 1


# --- what goes wrong without a kill

def steps(folder, callbacks=(), every=1, **kw):
    "A run in this process, with checkpoints in `folder`."
    from omnilab.forest.loader import Loader
    from omnilab.objectives.score import Scorer
    from omnilab.objectives.sft import sft_objective, size
    from omnilab.train.checkpoint import Checkpoint, resume
    from omnilab.train.loop import accelerator, prepare, train
    from omnilab.train.optim import optimizers, schedule
    torch.manual_seed(0)
    net = Tiny()
    run = prepare(Scorer(net), optimizers(net, lr=.01), accelerator(device='cpu'), data=Loader([toy(n) for n in range(4, 9)], ahead=0),
                  **{'objective': sft_objective(), 'size': size, 'schedule': schedule('constant', 6), 'steps': 6, 'packs': 2} | kw)
    resume(run, folder, {})
    return train(run, [*callbacks, Checkpoint(folder, {}, every=every, keep=2)])


def whole(folder, step):
    "The last checkpoint is that of `step`, it can be read, and nothing half written lies beside it."
    from safetensors.torch import load_file
    from omnilab.train.checkpoint import checkpoints
    last = checkpoints(folder)[-1]
    assert last.name == f'step-{step:06}' and not [p for p in folder.iterdir() if p.name.startswith('.')]
    assert load_file(last/'weights.safetensors') and torch.load(last/'state.pt', weights_only=True)['step'] == step
    return True


def straight(folder): return steps(folder).model.state_dict()


def same(a, b): return all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize('file', ['weights.safetensors', 'state.pt', 'recipe.json'])
def test_a_disk_that_is_full_in_the_middle_of_a_file(file, tmp_path, monkeypatch):
    "A write that stops halfway, as safetensors, torch and Python say it."
    import omnilab.train.checkpoint as c
    error, count = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), iter(range(99))
    def failing(write):
        def f(*args, **kw):
            path = next(Path(a) for a in args if isinstance(a, str | Path) and Path(a).name == file)
            if next(count) != 3: return write(*args, **kw)
            path.write_bytes(b'half')
            raise {'weights.safetensors': c.SafetensorError, 'state.pt': RuntimeError}.get(file, OSError)(*error.args)
        return f
    with monkeypatch.context() as m:
        if file == 'recipe.json':
            plain = Path.write_text
            m.setattr(Path, 'write_text', lambda self, text: failing(plain)(self, text) if self.name == file else plain(self, text))
        elif file == 'state.pt':
            plain = torch.save
            m.setattr(torch, 'save', lambda x, f: failing(plain)(x, f) if isinstance(f, Path) else plain(x, f))
        else: m.setattr(c, 'save_file', failing(c.save_file))
        with pytest.raises(OSError, match=r'^checkpoint of step 4 not written: .*No space left.*; the last whole one is .*step-000003$'): steps(tmp_path/'a')
    assert whole(tmp_path/'a', 3)
    assert same(steps(tmp_path/'a').model.state_dict(), straight(tmp_path/'b'))          # room again: it goes on


def test_a_disk_that_is_really_full(tmp_path):
    "A file system of 48 KB in memory; where it may not be mounted, the test above must do."
    disk = tmp_path/'disk'; disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=48k', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('tmpfs may not be mounted here')
    try:
        with pytest.raises(OSError, match='not written: .*; the last whole one is .*step-00000'): steps(disk/'a')
        from omnilab.train.checkpoint import checkpoints
        assert whole(disk/'a', int(checkpoints(disk/'a')[-1].name[5:]))
    finally: subprocess.run(['umount', '-l', disk], check=True)


def test_a_loss_that_is_no_number(tmp_path):
    from omnilab.objectives.sft import sft_objective
    good, calls = sft_objective(), iter(range(99))
    def bad(stats, pack, total):
        loss, metrics = good(stats, pack, total)
        return (loss, metrics) if next(calls) != 7 else (loss * torch.nan, {**metrics, 'loss': metrics['loss'] * torch.nan})
    with pytest.raises(FloatingPointError, match='^step 5: the loss is nan; weights are as before the step$'): steps(tmp_path/'a', objective=bad)
    assert whole(tmp_path/'a', 4)
    assert same(steps(tmp_path/'a').model.state_dict(), straight(tmp_path/'b'))


def test_a_tracker_that_fails(tmp_path):
    class Tracker:
        def on_step(self, run):
            if run.step == 3: raise ConnectionError('tracker: nobody answers')
    with pytest.raises(ConnectionError, match='nobody answers'): steps(tmp_path/'a', [Tracker()])
    assert whole(tmp_path/'a', 2)
    assert same(steps(tmp_path/'a').model.state_dict(), straight(tmp_path/'b'))


def test_the_command_on_a_disk_that_fills_up(tmp_path):
    "One line, and the checkpoint of before."
    from omnilab.data.world.write import write
    disk, rows = tmp_path/'disk', write(tmp_path/'rows', 8)
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('tmpfs may not be mounted here')
    try:
        words = ['--data.train', rows, '--output', disk/'run', '--train.steps', 4, '--train.max_length', 128, '--train.save_every', 1, '--train.device', 'cpu']
        done = subprocess.run([sys.executable, '-m', 'omnilab.train.sft', *map(str, words)], capture_output=True, text=True, timeout=300,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).resolve().parents[1])})
        assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr[-3000:]
        assert 'checkpoint of step 2 not written' in done.stderr.splitlines()[-1] and 'the last whole one is' in done.stderr.splitlines()[-1]
        assert whole(disk/'run/checkpoints', 1)
    finally: subprocess.run(['umount', '-l', disk], check=True)


if __name__ == '__main__': worker(sys.argv[1])
