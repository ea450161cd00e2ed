"torch.compile and activation checkpointing keep what a forest gives: windows, chunks, blocks and rotary sections of published families."
import families
import pytest
import torch
import transformers

import omnilab.forest.attention       # noqa: F401 (registers it)
from omnilab.data.parts import Message, Part, Sample
from omnilab.forest.bins import collate
from omnilab.forest.dummy import medium
from omnilab.forest.context import Encoder
from omnilab.forest.encode import encode
from omnilab.forest.tree import forest
from omnilab.objectives.score import Scorer


@pytest.mark.parametrize('family', ['gemma3', 'llama4', 'qwen2_5_vl'])
def test_same_numbers(family):
    torch.manual_seed(0)
    model, processor = getattr(families, family)(transformers)
    families.alive(model)
    enc, seen = Encoder(processor, model), medium('image', 1)
    asked = [Sample([Message('user', [seen, Part('text', q)]), Message('assistant', 'two of them')]) for q in ('how many are there ?', 'what is this ?')]
    pack = collate(forest([r for s in asked for r in encode(s, enc)]))
    assert len(pack.trees) == 1 and pack.n_rows == 2

    def run():
        model.zero_grad()
        logp = Scorer(model)(pack).logp
        logp.sum().backward()
        return logp.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def same(other):
        torch.testing.assert_close(other[0], plain[0], atol=1e-5, rtol=1e-5)
        assert other[1].keys() == plain[1].keys()
        for n, g in plain[1].items(): torch.testing.assert_close(other[1][n], g, atol=1e-5 * (1 + float(g.abs().max())), rtol=0, msg=n)

    plain = run()
    model.train(); model.gradient_checkpointing_enable()
    same(run())
    model.gradient_checkpointing_disable(); model.eval()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend='aot_eager')
    same(run())
    assert torch._dynamo.utils.counters['stats']['calls_captured'] > 100
