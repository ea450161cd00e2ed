"""Ways of packing that look right and give wrong numbers without a word: what stock transformers makes of each, and that ours is exact or refuses.

Three conversations on no, one and two pictures lie in one row; the truth is each of them alone. `stock` calls the model as the packing recipes that one finds
do; `ours` is a pack, its plan and the Scorer. Where this version of transformers no longer errs, the test says so.
"""
from copy import deepcopy
from types import SimpleNamespace

import pytest
from families import alive, gemma3, qwen2_5_vl, qwen2_audio, qwen3_vl

FAR, NEAR = .3, 1e-5            # of logits that spread by about 1: another answer; the same one


def conversations(kind='image'):
    from omnilab.data.parts import Message, Part, Sample
    from omnilab.forest.dummy import medium
    text = lambda t: Part('text', t)
    ask = lambda name, answer, *parts: Sample([Message('user', parts), Message('assistant', answer)], origin=name)
    a, b, c = (medium(kind, i) for i in range(3))
    return [ask('one', 'two of them', a, text('how many are there ?')), ask('none', 'here', text('what is this ? say one of them')),
            ask('two', 'one', b, c, text('look at the following and say what is this'))]


def case_of(make, kind='image'):
    "A model with stock attention, the same with ours, rows, and the logits of each row alone."
    import omnilab.forest.attention                 # noqa: F401 (registers 'forest'; first, it makes torchvision's import work)
    import torch, transformers                      # noqa: E401
    from omnilab.forest.context import Encoder
    from omnilab.forest.encode import encode
    torch.manual_seed(0)
    model, processor = make(transformers)
    ours, stock = alive(model), deepcopy(model)
    stock.set_attn_implementation('sdpa')
    rows = [r for s in conversations(kind) for r in encode(s, Encoder(processor, ours))]
    c = SimpleNamespace(ours=ours, stock=stock, rows=rows, processor=processor)
    with torch.no_grad(): c.truth = [forget(stock)(**batch(r), use_cache=False).logits[0] for r in rows]
    return c


def batch(row):
    from omnilab.objectives.exact import alone
    return alone(row)


def forget(model):
    "No offsets of rotary positions from an earlier call."
    for m in model.modules():
        if getattr(m, 'rope_deltas', None) is not None: m.rope_deltas = None
    return model


@pytest.fixture(scope='module', params=[qwen2_5_vl, qwen3_vl], ids=['Qwen2.5-VL', 'Qwen3-VL'])
def vl(request): return case_of(request.param)


def one_row(c):
    "All rows end to end, as the recipe that is right for stock transformers has them: positions of the text, then the model's own, and no mask."
    import torch
    row = lambda r: torch.arange(len(r))[None]
    own = [torch.cat([row(r), row(r).expand(3, -1) if r.positions is None else r.positions]) for r in c.rows]
    kinds = sorted({k for r in c.rows for k in r.extras})
    return dict(input_ids=torch.cat([r.ids for r in c.rows])[None], position_ids=torch.cat(own, 1)[:, None], use_cache=False,
                **{k: torch.cat([r.media[k] for r in c.rows if k in r.media]) for k in {k for r in c.rows for k in r.media}},
                **{k: torch.cat([r.extras.get(k, torch.zeros_like(r.ids)) for r in c.rows])[None] for k in kinds})


def documents(c):
    "Which row each token belongs to, from 1 on, [n]."
    import torch
    return torch.cat([torch.full((len(r),), i + 1) for i, r in enumerate(c.rows)])


def block_mask(c):
    import torch
    d = documents(c)
    return ((d[:, None] == d) & torch.ones(len(d), len(d)).tril().bool())[None, None]


def error(c, logits):
    "The largest difference of any row from itself alone."
    start, worst = 0, 0.
    for want in c.truth:
        worst = max(worst, float((logits[start:start + len(want)] - want).abs().max()))
        start += len(want)
    return worst


def stock(c, attn='sdpa', drop=(), **changes):
    "How far stock transformers is off; nothing may be raised, everything must be finite."
    import torch
    c.stock.set_attn_implementation(attn)
    inputs = {k: v for k, v in one_row(c).items() if k not in drop} | changes
    with torch.no_grad(): out = forget(c.stock)(**inputs).logits[0]
    assert out.isfinite().all()
    return error(c, out)


def pack_of(c):
    from omnilab.forest.bins import collate
    from omnilab.forest.tree import forest
    return collate(forest(c.rows))                  # nothing is shared, so the trees are the rows


def ours(c, drop=(), **changes):
    "How far a call of the model with a plan is off."
    import torch
    from omnilab.objectives.score import Scorer
    p = pack_of(c)
    Scorer(c.ours)                                  # from here on the model looks at what comes with a plan
    inputs = {k: v for k, v in p.model_inputs().items() if k not in drop} | changes
    with torch.no_grad(): return error(c, forget(c.ours)(**inputs).logits[0])


def scored(c, p):
    "How far the Scorer's log-probabilities are off."
    import torch
    from omnilab.objectives.score import Scorer
    with torch.no_grad(): got = Scorer(c.ours)(p).logp
    want = [t.log_softmax(-1)[:-1].gather(1, r.ids[1:, None])[r.target[1:], 0] for t, r in zip(c.truth, c.rows)]
    return float((got - torch.cat(want)).abs().max())


def refused(c, why, **call):
    with pytest.raises(ValueError, match=why) as e: ours(c, **call)
    assert '\n' not in str(e.value)


def test_the_right_way_and_ours(vl):
    "What the wrong ways are measured against."
    assert stock(vl) < NEAR and stock(vl, attention_mask=block_mask(vl), position_ids=one_row(vl)['position_ids'][1:]) < NEAR
    assert ours(vl) < NEAR and scored(vl, pack_of(vl)) < NEAR


# --- the ten

def test_1_cache_left_on(vl):
    "With a cache, stock transformers no longer looks for documents. Ours: the Scorer turns it off, and a plan doesn't care."
    assert stock(vl, use_cache=True) > FAR and stock(vl, drop=['use_cache']) > FAR
    assert ours(vl, use_cache=True) < NEAR and ours(vl, drop=['use_cache']) < NEAR
    cached = pack_of(vl)
    cached.model_inputs = lambda: type(cached).model_inputs(cached) | {'use_cache': True}
    assert scored(vl, cached) < NEAR


def test_2_rotary_positions_without_those_of_the_text(vl):
    "Three rows of positions say nothing of documents. Ours gives the same three, and the plan beside them."
    three = one_row(vl)['position_ids'][1:]
    assert stock(vl, position_ids=three) > FAR
    assert pack_of(vl).position_ids.equal(three) and ours(vl, position_ids=three) < NEAR


def test_3_a_mask_of_ones(vl):
    "Any mask switches the search for documents off."
    import torch
    ones = torch.ones_like(one_row(vl)['input_ids'])
    assert stock(vl, attention_mask=ones) > FAR
    refused(vl, 'attention_mask is given', attention_mask=ones)


def test_4_no_positions(vl):
    "The model counts through the whole row, and nothing says where documents begin."
    assert stock(vl, drop=['position_ids']) > FAR
    refused(vl, 'position_ids are missing', drop=['position_ids'])


def test_5_rotary_time_in_place_of_the_text(vl):
    "Time stands still inside a picture, so every patch begins a document."
    four = one_row(vl)['position_ids'].clone()
    four[0] = four[1]
    assert stock(vl, position_ids=four) > FAR
    refused(vl, 'expected those of the pack', position_ids=four)


def test_6_text_positions_alone(vl):
    "Two dimensions: the picture's rows and columns are gone, and in Qwen2.5-VL the documents too."
    text = one_row(vl)['position_ids'][0]
    assert stock(vl, position_ids=text) > FAR
    refused(vl, 'expected those of the pack', position_ids=text)


def test_7_numbers_of_documents_as_a_mask(vl):
    "1, 1, 2, 2, … reads as a mask of ones."
    numbers = documents(vl)[None]
    assert stock(vl, attention_mask=numbers) > FAR
    refused(vl, 'attention_mask is given', attention_mask=numbers)


def test_8_a_boolean_mask_under_eager_attention(vl):
    "Eager attention adds the mask, as 0 and 1. Ours: no mask beside a plan, and no plan where attention doesn't read it."
    mask, three = block_mask(vl), one_row(vl)['position_ids'][1:]
    assert stock(vl, 'eager') < NEAR and stock(vl, 'eager', attention_mask=mask, position_ids=three) > FAR
    refused(vl, 'attention_mask is given', attention_mask=mask)
    for attn in ('eager', 'sdpa'):
        vl.ours.set_attn_implementation(attn)
        try: refused(vl, f"attention '{attn}' doesn't read it")
        finally: vl.ours.set_attn_implementation('forest')


@pytest.fixture(scope='module')
def gemma(): return case_of(gemma3)


def plain_row(c):
    "Rows end to end for a model whose positions are places."
    return one_row(c) | dict(position_ids=one_row(c)['position_ids'][0])


def test_9_a_causal_mask_of_documents_for_pictures_that_look_both_ways(gemma):
    "A mask of one's own takes the place of Gemma's blocks and windows. Ours keeps both."
    assert stock(gemma, **plain_row(gemma)) < NEAR < FAR < stock(gemma, **plain_row(gemma) | dict(attention_mask=block_mask(gemma)))
    assert ours(gemma) < NEAR and scored(gemma, pack_of(gemma)) < NEAR
    refused(gemma, 'attention_mask is given', attention_mask=block_mask(gemma))


def test_10_labels_shifted_across_the_joint(vl):
    "The model shifts labels by one through the row: what a document begins with is learned from the end of the one before. Ours names source and target."
    import torch
    ids = one_row(vl)['input_ids']
    with torch.no_grad(): loss = float(forget(vl.stock)(**one_row(vl), labels=ids).loss)
    nll = [torch.nn.functional.cross_entropy(t[:-1], r.ids[1:], reduction='none') for t, r in zip(vl.truth, vl.rows)]
    assert abs(loss - float(torch.cat(nll).mean())) > 1e-2
    refused(vl, 'labels is given', labels=ids)
    p = pack_of(vl)
    assert documents(vl)[p.source].equal(documents(vl)[p.at]) and scored(vl, p) < NEAR


# --- the traps beside them

@pytest.fixture(scope='module')
def audio(): return case_of(qwen2_audio, 'audio')


def test_families_without_rotary_indices_err_alike(audio):
    "Places that start again isolate documents, until a mask of ones or a cache comes along."
    import torch
    row = plain_row(audio)
    assert stock(audio, **row) < NEAR
    assert stock(audio, **row | dict(attention_mask=torch.ones_like(row['input_ids']))) > FAR
    assert stock(audio, **row | dict(use_cache=True)) > FAR
    assert ours(audio) < NEAR and ours(audio, use_cache=True) < NEAR
    refused(audio, 'attention_mask is given', attention_mask=torch.ones_like(row['input_ids']))
    refused(audio, 'position_ids are missing', drop=['position_ids'])


def test_rows_encoded_without_their_model(vl):
    "Only the model knows where its pictures' patches stand; the places of tokens in their stead are wrong, and were taken."
    from omnilab.forest.encode import encode
    kept = vl.rows
    blind = [r for s in conversations() for r in encode(s, vl.processor)]
    try:
        vl.rows = blind
        assert all(r.positions is None for r in blind)
        refused(vl, r'expected rows of encode\(sample, processor, model\)')
    finally: vl.rows = kept


def long_rope(kind, **rope):
    "A Llama whose frequencies change beyond 32 positions, and rows of 20 and 60 tokens of text."
    import torch, transformers                      # noqa: E401
    from families import small, words, tokenizer
    from omnilab.forest.tree import Row
    from omnilab.models.load import limits
    rope = dict(rope_type=kind, rope_theta=1e4, factor=4., **rope)
    model = small(transformers.LlamaConfig(**words(tokenizer({})), max_position_embeddings=32 if kind == 'dynamic' else 128, rope_parameters=rope))
    ours = alive(model)
    stock = deepcopy(model)
    stock.set_attn_implementation('sdpa')
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 20, (n,), generator=g) for n in (20, 60)]
    rows = [Row(i, torch.arange(len(i)) >= len(i) // 2, steps=limits(ours).steps) for i in ids]
    with torch.no_grad(): truth = [deepcopy(stock)(**batch(r), use_cache=False).logits[0] for r in rows]
    return SimpleNamespace(ours=ours, stock=stock, rows=rows, truth=truth)


def test_short_rows_beside_a_long_one():
    "Long RoPE reads the short ones with the frequencies of the long one. Ours packs them apart, and a pack of both is refused."
    from dataclasses import replace
    from omnilab.forest.bins import pack
    from omnilab.forest.tree import forest
    c = long_rope('longrope', original_max_position_embeddings=32, long_factor=[4.] * 64, short_factor=[1.] * 64)
    assert stock(c, **plain_row(c)) > FAR
    refused(c, 'rows of 20 and of 60 positions')
    packs, truth = pack(forest(c.rows), 128), c.truth
    assert [p.n_rows for p in packs] == [1, 1]
    for p, c.truth in zip(packs, ([t] for t in truth)):
        c.rows = p.rows
        assert ours(c) < NEAR and scored(c, p) < NEAR
    both = [replace(r, ids=r.ids.index_fill(0, r.ids.new_tensor(range(18)), 7)) for p in packs for r in p.rows]
    assert len(forest(both)) == 2 and len(forest([replace(r, steps=()) for r in both])) == 1       # even where they begin alike


def test_a_row_longer_than_any_before():
    "Dynamic RoPE follows the longest row so far: what a row is given depends on those that came before. Ours refuses rows as long."
    import torch
    c = long_rope('dynamic')
    assert stock(c, **plain_row(c)) > FAR
    longer = torch.randint(5, 20, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        c.stock(longer)
        assert float((c.stock(**batch(c.rows[1]), use_cache=False).logits[0] - c.truth[1]).abs().max()) > FAR     # alone, but not the first
    refused(c, 'a row of 60 positions; expected fewer than 32')
    c.rows, c.truth = c.rows[:1], c.truth[:1]
    assert ours(c) < NEAR


def test_offsets_that_an_earlier_call_left(vl):
    "`generate` leaves an offset on the model, and a call without positions adds it. Ours gives positions, and the Scorer forgets."
    import torch
    p = pack_of(vl)
    holder = next(m for m in vl.ours.modules() if hasattr(m, 'rope_deltas'))
    holder.rope_deltas = torch.full((1, 1), 7)
    with torch.no_grad(): assert error(vl, vl.ours(**p.model_inputs()).logits[0]) < NEAR
    holder.rope_deltas = torch.full((1, 1), 7)
    assert scored(vl, p) < NEAR and holder.rope_deltas is None


def test_pictures_in_another_order(vl):
    "Media are read in the order of the tokens that stand for them. Ours joins both from the same trees, whatever their order."
    import torch
    from omnilab.forest.bins import collate
    from omnilab.forest.tree import forest
    row = one_row(vl)
    size = int(row['image_grid_thw'][0].prod())
    assert stock(vl, pixel_values=row['pixel_values'].roll(size, 0)) > FAR
    p = collate(forest(vl.rows[::-1]))
    with torch.no_grad(): got = forget(vl.ours)(**p.model_inputs()).logits[0].split([len(r) for r in vl.rows[::-1]])
    assert max(float((a - b).abs().max()) for a, b in zip(got[::-1], vl.truth)) < NEAR
