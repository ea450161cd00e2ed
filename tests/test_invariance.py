"A step's loss and gradients are those of its rows, one by one in plain torch: in any packs, merged or not, of one micro-batch or many, on one process or two."
import os, random, subprocess, sys
from pathlib import Path

import pytest
import torch

LAYOUTS = 6


def rows_of(tmp):
    "The embedded model, tiny and untrained, and rows of pictures, sounds, clips and text that share beginnings."
    from test_mixed_ranks import ours
    from omnilab.data.samples import read
    from omnilab.forest.context import Encoder
    from omnilab.forest.encode import encode
    import omnilab.forest.attention       # noqa: F401 (registers it)
    import transformers
    torch.manual_seed(0)
    model, processor = ours(transformers)
    model.set_attn_implementation('forest')
    enc = Encoder(processor, model)
    return model.train(), enc, [r for s in read(tmp/'train.jsonl') for r in encode(s, enc)]


def alone(model, rows):
    "Mean loss over all targets, and its gradients; every row by itself, no Scorer, no loop."
    from omnilab.forest.bins import collate
    from omnilab.forest.tree import forest
    total, n = 0., 0
    for r in rows:
        p = collate(forest([r], merge=False))
        total = total + torch.nn.functional.cross_entropy(model(**p.model_inputs()).logits[0, p.source], p.target, reduction='sum')
        n += len(p.target)
    model.zero_grad(); (total / n).backward()
    return (total / n).item(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def together(model, enc, rows, seed):
    "The same by the loop, in a layout that is drawn."
    from functools import partial
    from omnilab.forest.bins import pack
    from omnilab.forest.dummy import complete, dummies
    from omnilab.forest.loader import Loader
    from omnilab.forest.tree import forest
    from omnilab.objectives.score import Scorer
    from omnilab.objectives.sft import sft_objective, size
    from omnilab.train.loop import accelerator, gradients, holds, means, prepare
    from omnilab.train.optim import optimizers
    draw = random.Random(seed)
    mine = draw.sample(rows, len(rows))
    packs = list(pack(forest(mine, merge=draw.random() < .5), draw.choice([160, 256, 512, 2048])))
    acc, whole = accelerator(device='cpu'), partial(complete, dummies=dummies(packs, enc))
    net = Scorer(model, logits=draw.choice([2**12, 2**25]))
    data = Loader(packs, seed=seed, rank=acc.process_index, world=acc.num_processes)
    run = prepare(net, optimizers(model), acc, map(whole, packs), complete=whole, data=data, objective=sft_objective(), size=size,
                  schedule=lambda step: 1., steps=1, packs=len(packs))
    run.scorer.train(); run.scorer.zero_grad()
    group = run.data.take(len(packs))
    sums, _ = gradients(run, group, holds(run, group)['size'])
    return means(sums, acc)['loss'], {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}, len(packs)


def worker(tmp):
    model, enc, rows = rows_of(Path(tmp))
    loss, grads = alone(model, rows)
    found = []
    for seed in range(LAYOUTS):
        got, mine, packs = together(model, enc, rows, seed)
        gap = max(((mine[k] - g).abs().max() / (1e-3 + g.abs().max())).item() for k, g in grads.items())
        found.append((packs, abs(got - loss), gap, sorted(mine.keys() - grads.keys())))
    if int(os.environ['RANK']) == 0: torch.save(found, Path(tmp)/f'{os.environ["WORLD_SIZE"]}.pt')


@pytest.mark.parametrize('world', [1, 2])
def test_layout_changes_nothing(tmp_path_factory, world):
    from omnilab.data.world.write import write
    tmp = tmp_path_factory.mktemp('invariance')
    write(tmp, 12, tasks=['color', 'count', 'tones', 'motion'], share=2)
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': f'{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}'}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(world), __file__, str(tmp)]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp/f'{world}.pt', weights_only=True)
    assert len({packs for packs, *_ in found}) > 2                         # the layouts do differ
    for packs, loss, gap, more in found: assert loss < 1e-5 and gap < 2e-4 and not more, found


if __name__ == '__main__': worker(sys.argv[1])
