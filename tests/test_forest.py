"The forest at work: compiled, in bins, and on a model that reads and writes every modality. Random tries, plans and attention: test_forest_properties."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.nn.functional import cross_entropy

import omnilab.forest.attention       # noqa: F401 (registers it)
from omnilab.data.media import Audio, Video
from omnilab.data.samples import Message, Part, Sample
from omnilab.forest.bins import bins, collate, pack
from omnilab.forest.context import Encoder
from omnilab.forest.encode import encode, encode_all
from omnilab.forest.operator import attention
from omnilab.forest.plan import plan
from omnilab.forest.tree import Row, forest, tree

quick = settings(max_examples=150, deadline=None, derandomize=True)


def row(word):
    "A word as a row; upper case is trained. All words of a list begin alike."
    return Row(torch.tensor([1, *(ord(c.lower()) for c in word)]), torch.tensor([False, *(c.isupper() for c in word)]), sample=word)


# --- plans and bins

def test_the_operator_compiles_and_keeps_its_gradient():
    p = plan([tree([row('aab' * 5), row('aaa' * 5)])], call=10)
    q, k, v = (torch.randn(1, 2, len(p), 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    f = lambda q, k, v: attention(q, k, v, p).square().sum()
    compiled = torch.compile(f, backend='aot_eager', fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(f(q, k, v), (q, k, v))): torch.testing.assert_close(a, b)


@quick
@given(st.lists(st.integers(1, 20), max_size=40))
def test_bins_hold_everything_once(lengths):
    out = bins(lengths, 20)
    assert sorted(i for b in out for i in b) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in b) for b in out]
    assert all(0 < s <= 20 for s in sizes) and sum(s <= 10 for s in sizes) <= 1


# --- every modality in and out, packed

@pytest.fixture(scope='module')
def omni():
    from omnilab.models.codecs import AudioCodec, ImageCodec, KMeansVQ
    from omnilab.models.omni import OmniConfig, new_model
    from omnilab.models.processor import OmniProcessor, build_tokenizer
    rng = np.random.default_rng(0)
    pics = [Image.fromarray(np.kron(rng.integers(0, 2, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8) * 255) for _ in range(6)]
    beeps = [Audio((.5 * np.sin(2 * np.pi * f * np.arange(960) / 8000)).astype(np.float32), 8000) for f in (500, 700, 900)]
    tok = build_tokenizer(['what color is it? a red circle, three of them'] * 20, text_vocab=300, codes={'image': 16, 'audio': 8})
    proc = OmniProcessor(tok)
    proc.codecs = {'image': ImageCodec(KMeansVQ(16)).fit(pics), 'audio': AudioCodec(KMeansVQ(8)).fit(beeps)}
    ids = {f'{k}_token_id': tok.convert_tokens_to_ids(f'<|{k}|>') for k in ('image', 'video', 'audio')}
    def model(attn):
        config = OmniConfig(
            text_config=dict(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             head_dim=8, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id),
            vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=48, patch_size=8), **ids)
        config._attn_implementation = attn
        return new_model(config).double().train()
    return proc, model, pics, beeps


def asked(question, answer, origin=''):
    parts = lambda xs: tuple(x if isinstance(x, Part) else Part('text', x) for x in xs)
    return Sample([Message('user', parts(question)), Message('assistant', parts(answer))], origin=origin)


@pytest.fixture(scope='module')
def mixed(omni):
    _, _, pics, beeps = omni
    p, s, v = Part('image', pics[0]), Part('audio', beeps[0]), Part('video', Video(np.stack([np.array(x) for x in pics[:4]]), 2.))
    box = Part('box', [8, 8, 24, 24], {'size': (48, 48)})
    return [asked([p, 'what color is it?'], ['red']), asked([p, 'how many?'], ['three of them']), asked([p, 'where?'], [box]),
            asked([s, 'what is it?'], ['a circle']), asked(['draw a red circle'], [Part('image', pics[1])]), asked(['a red beep'], [Part('audio', beeps[1])]),
            asked([v, 'what color?'], ['red']), asked([p, s, 'both?'], ['it is']), asked([s, 'draw it'], [Part('image', pics[2])]), asked(['hi'], ['hello'])]


def test_media_are_read_once_and_answers_are_codes(omni, mixed):
    proc, _, _, _ = omni
    rows, problems = encode_all(mixed, proc, omni[1]('sdpa'))
    assert not problems and len(rows) == len(mixed)
    assert rows[0].media['pixel_values'] is rows[1].media['pixel_values'] and not rows[4].media
    for r, s in zip(rows, mixed):
        got, want = proc.parse(r.ids[r.target]), s.messages[-1].parts
        assert [p.type for p in got] == [p.type for p in want]
        assert r.ids[-1] == proc.tokenizer.eos_token_id and bool(r.target[-1])
    assert proc.parse(rows[1].ids[rows[1].target])[0].value == 'three of them'


def test_a_mixed_pack_equals_its_rows(omni, mixed):
    proc, make, _, _ = omni
    stock, ours = make('sdpa'), make('forest')
    rows = [r for s in mixed for r in encode(s, Encoder(proc, ours))]
    trees = forest(rows)
    assert len(trees) == len(rows) - 3                        # three questions share a picture, two a sound
    p = collate(trees)
    def logits(m, r): return m(input_ids=r.ids[None], use_cache=False, **r.media).logits[0]
    def grads(m, loss): m.zero_grad(); loss.backward(); return {n: x.grad.clone() for n, x in m.named_parameters() if x.grad is not None}
    together, start = ours(**p.model_inputs()).logits[0], 0
    for t in trees:
        for i, r in enumerate(t.rows): torch.testing.assert_close(together[t.path(i) + start], logits(stock, r), rtol=1e-5, atol=1e-6)
        start += len(t)
    got = grads(ours, (cross_entropy(together[p.source], p.target, reduction='none') * p.weight).sum())
    want = grads(stock, sum(cross_entropy(logits(stock, r)[:-1], r.ids[1:], reduction='none')[r.target[1:]].sum() for r in rows))
    assert got.keys() == want.keys() and any('vision' in k for k in got) and any('audio' in k for k in got)
    for k in want: assert (got[k] - want[k]).abs().max() <= 1e-5 * want[k].abs().max(), k


def test_packs_of_any_length_learn_the_same(omni, mixed):
    proc, make, _, _ = omni
    model = make('forest')
    rows, _ = encode_all(mixed, proc, model)
    def total(trees, size):
        with torch.no_grad(): return sum(float((cross_entropy(model(**p.model_inputs()).logits[0, p.source], p.target, reduction='none') * p.weight).sum())
                                         for p in pack(trees, size))
    apart = total(forest(rows, merge=False), 10_000)
    for size in (80, 120, 400): assert total(forest(rows, max_length=size), size) == pytest.approx(apart, rel=1e-6)
