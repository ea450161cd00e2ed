"""Two processes of which one has a picture, a sound or a clip and the other none: nobody waits, and what is learned is what one process learns."""
import copy, os, subprocess, sys
from pathlib import Path

import pytest
import torch

FAMILIES = 'ours', 'qwen2_5_vl', 'llava_onevision', 'qwen2_audio'
ORDER = ['image', 'text', 'text', 'audio', 'text', 'text', 'video', 'image', 'audio', 'text']          # two a step: one for each process


def ours(transformers):
    "The embedded model, tiny and untrained."
    from omnilab.models.load import load
    from omnilab.train.pretrain import SizeArgs, make_model
    processor = load('omni-tiny').processor
    model = make_model(SizeArgs(hidden=32, layers=1, vision=32, vision_layers=1, audio=16), processor)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model, processor


def make(family):
    "Model, encoder, and a pack for each word of ORDER that the model takes."
    import test_families_media as media
    import transformers
    from omnilab.data.parts import Message, Part, Sample
    from omnilab.forest.bins import collate
    from omnilab.forest.dummy import medium
    from omnilab.forest.context import Encoder
    from omnilab.forest.encode import EncodeError, encode
    from omnilab.forest.tree import forest
    torch.manual_seed(0)
    model, processor = (ours if family == 'ours' else getattr(media, family))(transformers)
    if family != 'ours': media.alive(model)
    enc, packs = Encoder(processor, model), []
    for i, kind in enumerate(ORDER):
        seen = [] if kind == 'text' else [medium(kind, i)]
        s = Sample([Message('user', [*seen, Part('text', 'how many are there ?')]), Message('assistant', 'two of them')])
        try: packs.append(collate(forest(encode(s, enc))))
        except EncodeError: pass                                     # a kind that this family doesn't take
    return model, enc, packs


def tower(name): return any(x in name for x in ('visual', 'vision', 'audio', 'projector'))


def trained(family, frozen):
    "Losses and weights of a run; the packs are taken in order, two a step."
    from functools import partial
    from omnilab.forest.dummy import complete, dummies
    from omnilab.forest.loader import Loader
    from omnilab.objectives.score import Scorer
    from omnilab.objectives.sft import sft_objective, size
    from omnilab.train.loop import accelerator, prepare, train
    from omnilab.train.optim import optimizers, schedule
    model, enc, packs = make(family)
    for n, p in model.named_parameters(): p.requires_grad_(not (frozen and tower(n)))
    whole, rows = partial(complete, dummies=dummies(packs, enc)), []
    keep = type('Keep', (), {'on_step': lambda self, run: rows.append(run.metrics['loss'])})()
    run = prepare(Scorer(model), optimizers(model, lr=.01), accelerator(device='cpu'), map(whole, packs[:2]), complete=whole, data=Loader(packs, shuffle=False),
                  objective=sft_objective(), size=size, schedule=schedule('constant', 5), steps=len(packs) // 2, packs=2)
    train(run, [keep])
    looks = getattr(run.accelerator.ddp_handler, 'find_unused_parameters', None)
    return {'losses': rows, 'weights': {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}, 'looks': looks}


def sharded(family, lora=False):
    "Largest relative difference of FSDP2's gradients from those of a whole copy: each process its own kind of pack, blocks of all parts sharded."
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from omnilab.forest.dummy import complete, dummies
    from omnilab.objectives.score import Scorer
    from omnilab.tune.adapters import adapt
    model, enc, packs = make(family)
    trees = dummies(packs, enc)
    if lora:                                    # the head too; its second factors start at zero, where the first would learn nothing
        model = adapt(model, 'lora', 4, 8, 0., ['language', 'head'], (), 0)
        for n, p in model.named_parameters():
            if 'lora_B' in n: torch.nn.init.normal_(p, 0, .1, generator=torch.Generator().manual_seed(1))
    whole, parts, mine = Scorer(copy.deepcopy(model)), Scorer(model), [complete(p, trees) for p in packs[:2]]
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    units = [m for m in model.modules() if type(m).__name__ in parts._no_split_modules]         # as Accelerate chooses them
    for m in reversed(units): fully_shard(m, mesh=mesh)                                        # those inside others first
    fully_shard(parts, mesh=mesh)
    parts(mine[dist.get_rank()]).logp.sum().backward()
    sum(whole(p).logp.sum() for p in packs[:2]).backward()
    gaps = [0.]
    for p, q in zip(parts.parameters(), whole.parameters()):
        if q.grad is not None: gaps.append(((p.grad.full_tensor() * dist.get_world_size() - q.grad).abs().max() / (1 + q.grad.abs().max())).item())
    return max(gaps), len(units)


def worker(out):
    result = {f'{f} {"frozen" if z else "all"}': trained(f, z) for f in FAMILIES for z in (False, True)}
    if int(os.environ['WORLD_SIZE']) > 1: result['sharded'] = {f'{f} {"lora" if z else "all"}': sharded(f, z) for f in FAMILIES for z in (False, True)}
    if int(os.environ['RANK']) == 0: torch.save(result, out)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp('mixed'), []
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': f'{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}'}
    for n in (1, 2):
        cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), __file__, str(folder/f'{n}.pt')]
        done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        out.append(torch.load(folder/f'{n}.pt', weights_only=True))
    return out


@pytest.mark.parametrize('what', ['all', 'frozen'])
@pytest.mark.parametrize('family', FAMILIES)
def test_as_one_process(results, family, what):
    one, two = (r[f'{family} {what}'] for r in results)
    assert len(one['losses']) == len(two['losses']) >= 3
    assert all(abs(a - b) < 1e-4 * (1 + abs(a)) for a, b in zip(one['losses'], two['losses'])), (one['losses'], two['losses'])
    assert any(map(tower, one['weights'])) == (what == 'all')
    for n, w in one['weights'].items(): torch.testing.assert_close(two['weights'][n], w, atol=2e-4, rtol=1e-3, msg=lambda m, n=n: f'{n}: {m}')


@pytest.mark.parametrize('what', ['all', 'lora'])
@pytest.mark.parametrize('family', FAMILIES)
def test_sharded(results, family, what):
    gap, units = results[1]['sharded'][f'{family} {what}']
    assert units > 1 and gap < 1e-4


def test_nothing_to_look_for(results): assert results[1]['ours all']['looks'] is False


if __name__ == '__main__': worker(sys.argv[1])
