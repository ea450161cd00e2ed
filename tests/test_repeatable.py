"A seed is a data set and a run, to the bit: in every process, whatever its memory held before, on any number of threads."
import hashlib
from types import SimpleNamespace

import torch
from conftest import run
from torch import nn

from omnilab.objectives.score import Scorer


def written(folder, noise): # {file: hash of its bytes}
    done, _ = run(['-m', 'omnilab.cli', 'world', '--out', folder, '--n', 300, '--seed', 7], MALLOC_PERTURB_=str(noise), PYTHONHASHSEED=str(noise))
    assert done.returncode == 0, done.stderr
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_same_bytes_in_every_process(tmp_path):
    first, *others = [written(tmp_path/str(noise), noise) for noise in (1, 90, 255)]
    assert {p.rsplit('.')[-1] for p in first} >= {'jsonl', 'png', 'wav', 'mp4'}
    for other in others: assert other == first


class Rows(nn.Module):
    "As many hidden states as an embedding has rows, and a head."
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(60, 192), nn.Linear(192, 5, bias=False)
    def get_output_embeddings(self): return self.lm_head
    def forward(self, input_ids, **kw): return SimpleNamespace(logits=self.lm_head(self.embed(input_ids)))


def test_same_gradient_where_many_answers_begin():
    torch.manual_seed(0)
    ids, scorer, threads = torch.arange(60)[None], Scorer(Rows()), torch.get_num_threads()
    pack = SimpleNamespace(model_inputs=lambda: {'input_ids': ids}, source=torch.randint(60, (600,)), labels=torch.randint(5, (600,)))
    def gradient():
        scorer.zero_grad()
        (scorer(pack).logp * torch.linspace(0, 1, 600)).sum().backward()
        return scorer.model.embed.weight.grad.clone()
    torch.set_num_threads(2)
    try: first, again = gradient(), [gradient() for _ in range(200)]
    finally: torch.set_num_threads(threads)
    for g in again: assert g.equal(first)
