"What a process holds where several share the work: foreseen from one process' trace, and measured in two."
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from test_launch import ENV, divided

pytestmark = pytest.mark.slow


def model():
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    m = Qwen3ForCausalLM(Qwen3Config(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                                     vocab_size=1000))
    m.set_attn_implementation('forest')
    return m


def packs():
    from omnilab.forest.bins import pack
    from omnilab.forest.tree import Row, forest
    torch.manual_seed(0)
    return list(pack(forest([Row(torch.randint(3, 1000, (64,)), torch.arange(64) > 32) for _ in range(2)]), 64))


def recipe(kind):
    from omnilab.train.recipe import SFTRecipe
    r = SFTRecipe()
    r.adapter.kind, r.train.packs, r.train.device = kind, 2, 'cpu'
    return r


def held(kind):
    "Bytes that this process holds at its worst in a second step."
    from omnilab.forest.loader import Loader
    from omnilab.memory.trace import measured
    from omnilab.train import loop
    from omnilab.train.assemble import assemble
    from omnilab.train.model import trainable
    r = recipe(kind)
    acc = loop.accelerator('no', 'cpu')
    run = assemble(trainable(model(), r), r, acc, None, data=Loader(packs(), shuffle=False, ahead=0), schedule=lambda step: 1., steps=9, packs=2)
    run.scorer.train()
    return int(measured(run).max())


def worker(folder):
    from accelerate.state import AcceleratorState
    found = {f'ddp-{kind}': held(kind) for kind in ('none', 'lora')}
    AcceleratorState._reset_state()
    divided()
    found |= {f'fsdp2-{kind}': held(kind) for kind in ('none', 'lora')}
    if int(os.environ['RANK']) == 0: Path(folder, 'held.json').write_text(json.dumps(found))


@pytest.fixture(scope='module')
def measured_by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, str(folder)]
    done = subprocess.run(cmd, env={**ENV, 'ACCELERATE_USE_CPU': 'true'}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder/'held.json').read_text())


@pytest.mark.parametrize('shared, kind', [('ddp', 'none'), ('ddp', 'lora'), ('fsdp2', 'none'), ('fsdp2', 'lora')])
def test_each_of_two(measured_by_two, shared, kind):
    from omnilab.memory.planner import shares
    from omnilab.memory.trace import hollow, trace
    r = recipe(kind)
    alone = trace(model(), packs()[:1], r)
    foreseen, real = sum(shares(alone, hollow(model()), 2, shared).values()), measured_by_two[f'{shared}-{kind}']
    assert abs(foreseen / real - 1) < .05, (foreseen, real)
    assert shared == 'ddp' or real < .95 * alone.peak


if __name__ == '__main__': worker(sys.argv[1])
