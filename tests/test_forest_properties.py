"Any rows: their tries against nested dicts, their plans against the rule token by token, their attention against one dense softmax."
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings, strategies as st

from omnilab.forest.bins import collate
from omnilab.forest.kernels import BACKENDS
from omnilab.forest.operator import attention
from omnilab.forest.plan import plan, tile_mask
from omnilab.forest.tree import Row, forest, tree

quick = settings(max_examples=120, deadline=None, derandomize=True, database=None)
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
MEDIUM = 9          # the token that stands for media


# --- rows: branches off earlier rows at any depth, equal rows, rows that end inside others

@st.composite
def texts(draw, letters=3, most=12):
    "Lists of token ids; a later one often begins as an earlier one does."
    ids, out = st.lists(st.integers(0, letters - 1), max_size=most), []
    for _ in range(draw(st.integers(1, 6))):
        stem = draw(st.sampled_from(out)) if out and draw(st.booleans()) else []
        out.append(stem[:draw(st.integers(0, len(stem)))] + draw(ids))
    return out


@st.composite
def media_rows(draw):
    "Rows on a few pictures and rows on none; positions and token types are the model's own or missing; some rows part by their positions alone."
    pictures, lead = st.sampled_from([('cat',), ('dog',), ('cat', 'dog'), ()]), st.lists(st.integers(0, 1), max_size=2)
    heads = draw(st.lists(st.tuples(pictures, lead), min_size=1, max_size=3))
    own, types = draw(st.booleans()), draw(st.booleans())
    out = []
    for words in draw(texts()):
        keys, lead = draw(st.sampled_from(heads))
        ids = [5, *lead, *[MEDIUM] * 2 * len(keys), *words]
        end = max((i + 1 for i, t in enumerate(ids) if t == MEDIUM), default=0)
        late = draw(st.sampled_from([0, 0, 0, 2])) * own
        positions = torch.tensor([[i + late * (i > end) for i in range(len(ids))], [i // 2 for i in range(len(ids))]]) if own else None
        target = torch.tensor([False] * (1 + end) + draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))[:len(ids)]
        media = {'pixel_values': torch.tensor([[hash_of(k)] for k in keys])} if keys else {}
        extras = {'token_type_ids': torch.tensor([int(t == MEDIUM) for t in ids])} if types else {}
        out.append(Row(torch.tensor(ids), target, media, keys, end, positions, extras, sample=len(out)))
    return out


def hash_of(key): return float(sum(map(ord, key)))


# --- the naive trie: a dict in a dict, a token at a time

def tokens(row):
    "Everything by which two tokens of rows may differ."
    places = [[]] * len(row) if row.positions is None else row.positions.T.tolist()
    kinds = row.extras.get('token_type_ids', torch.zeros(len(row))).tolist()
    return [(i, *p, k) for i, p, k in zip(row.ids.tolist(), places, kinds)]


def nested(rows):
    root = {}
    for r in rows:
        at = root
        for t in tokens(r): at = at.setdefault(t, {})
    return root


def lay_out(rows):
    "The trie of rows, a record for each token, in depth-first order."
    out, at = [], {}                                    # at: path -> index
    def walk(kids, path):
        for t, below in kids.items():
            me = dict(token=t, path=(*path, t), depth=len(path), before=at.get(path, -1), branches=len(below))
            at[me['path']] = len(out)
            out.append(me)
            walk(below, me['path'])
            me['end'] = len(out)
    walk(nested(rows), ())
    for me in out: me['weight'] = 0
    for r in rows:
        path = ()
        for t, on in zip(tokens(r), r.target.tolist()): path += (t,); out[at[path]]['weight'] += on
    return out, at


def agrees(t, rows):
    "A tree is the naive trie of these rows."
    want, at = lay_out(rows)
    column = lambda name: [me[name] for me in want]
    trained = [i for i, me in enumerate(want) if me['weight']]
    assert t.ids.tolist() == [me['token'][0] for me in want]
    assert t.end.tolist() == column('end') and t.depth.tolist() == column('depth') and t.reach.tolist() == list(range(len(want)))
    assert t.at.tolist() == trained and t.weight.tolist() == [want[i]['weight'] for i in trained]
    assert t.source.tolist() == [want[i]['before'] for i in trained] and t.target.tolist() == [want[i]['token'][0] for i in trained]
    begins = [i for i, me in enumerate(want) if me['before'] < 0 or want[me['before']]['branches'] > 1]
    stops = [*begins[1:], len(want)]
    holder = {i: n for n, (a, b) in enumerate(zip(begins, stops)) for i in range(a, b)}
    assert t.nodes.tolist() == [[a, b, want[a]['end'], holder.get(want[a]['before'], -1)] for a, b in zip(begins, stops)]
    for i, r in enumerate(rows):                        # every row is given back
        path = t.path(i)
        assert path.tolist() == [at[tuple(tokens(r)[:n + 1])] for n in range(len(r))] and int(t.last[i]) == int(path[-1])
        assert torch.equal(t.ids[path], r.ids)
        assert t.positions is r.positions is None or torch.equal(t.positions[:, path], r.positions)
        assert t.extras.keys() == r.extras.keys() and all(torch.equal(t.extras[k][path], v) for k, v in r.extras.items())


@quick
@given(texts())
def test_a_tree_is_its_naive_trie(words):
    rows = [Row(torch.tensor([5, *w]), torch.tensor([False, *(i % 3 != 1 for i in w)])) for w in words]
    found = tree(rows)
    agrees(found, rows)
    assert found.rows == rows and len(found) <= sum(map(len, rows))


@quick
@given(media_rows(), st.integers(1, 5), st.none() | st.integers(0, 6), st.booleans())
def test_a_forest_is_its_naive_tries(rows, shared, less, merge):
    groups = {}
    for i, r in enumerate(rows):
        head = r.media_keys, r.media_end, tuple(tokens(r)[:r.media_end or shared])
        groups.setdefault(head if merge else i, []).append(r)
    longest = less if less is None else max(1, max(len(lay_out(g)[0]) for g in groups.values()) - less)      # as long as the largest trie, or a bit less
    want = []
    for group in groups.values():                       # a row joins the last tree while that stays short enough
        want.append([])
        for r in group:
            if want[-1] and longest and len(lay_out([*want[-1], r])[0]) > longest: want.append([])
            want[-1].append(r)
    got = forest(rows, merge, shared, longest)
    assert [[r.sample for r in t.rows] for t in got] == [[r.sample for r in g] for g in want]
    for t, g in zip(got, want):
        agrees(t, g)
        assert t.media_keys == g[0].media_keys and all(torch.equal(t.media[k], v) for r in g for k, v in r.media.items())
        assert t.media.keys() == g[0].media.keys()
        assert not longest or len(t) <= longest or len(t.rows) == 1


@quick
@given(media_rows())
def test_a_pack_holds_its_trees_side_by_side(rows):
    trees = forest(rows, min_shared=2)
    p, start = collate(trees), 0
    for t in trees:
        s = slice(start, start + len(t))
        assert torch.equal(p.input_ids[0, s], t.ids) and torch.equal(p.plan.rule[1, s], t.depth) and torch.equal(p.plan.rule[0, s], t.end + start)
        assert torch.equal(p.position_ids[..., s].reshape(-1, len(t)), t.depth[None] if t.positions is None else t.positions)
        for k, v in t.extras.items(): assert torch.equal(p.extras[k][0, s], v)
        start += len(t)
    assert len(p) == start and float(p.weight.sum()) == sum(int(r.target.sum()) for r in rows)
    assert torch.equal(p.input_ids[0, p.at], p.target) and bool((p.source >= 0).all())
    assert [k for t in trees for k in t.media_keys] == [k for r in (t.rows[0] for t in trees) for k in r.media_keys]
    if p.media: assert p.media['pixel_values'][:, 0].tolist() == [hash_of(k) for t in trees for k in t.media_keys]


# --- plans

@st.composite
def layers(draw, trees):
    "A row of these trees as some layer sees it: who sees whom, token by token, and what `Plan.view` is told."
    found = [lay_out(t.rows)[0] for t in trees]
    blocks, number = [], 0
    for t in trees:
        mine = [-1] * len(t)
        for start, stop, *_ in t.nodes.tolist():        # a block lies in one node
            if stop > start and draw(st.booleans()):
                a = draw(st.integers(start, stop - 1)); b = draw(st.integers(a + 1, stop))
                mine[a:b] = [number] * (b - a); number += 1
        blocks += mine
    window, chunk = draw(st.none() | st.integers(1, 9)), draw(st.none() | st.integers(1, 9))
    bounded, blocked = draw(st.booleans()), draw(st.booleans())
    if not blocked: blocks = [-1] * len(blocks)
    rows = [(n, me['path'], b) for (n, me), b in zip(((n, me) for n, f in enumerate(found) for me in f), blocks)]
    def sees(q, k):
        (tree_q, path_q, block_q), (tree_k, path_k, block_k) = rows[q], rows[k]
        if tree_q != tree_k: return False
        d, e = len(path_q) - 1, len(path_k) - 1
        together = block_q == block_k >= 0
        near = (not window or d - e < window) and (not chunk or d // chunk == e // chunk)
        if path_q[:len(path_k)] == path_k: return near or (together and not bounded)
        return together and e > d
    mask = torch.tensor([[sees(q, k) for k in range(len(rows))] for q in range(len(rows))])
    return dict(window=window, chunk=chunk, blocks=torch.tensor(blocks) if blocked else None, bounded=bounded), mask


def covered(p):
    "How often the tiles of a plan cover each pair."
    out = torch.zeros(len(p), len(p), dtype=torch.int)
    for q0, q1, k0, k1, kind in p.tiles.tolist(): out[q0:q1, k0:k1] += tile_mask((q0, q1, k0, k1, kind), p.rule).int()
    return out


documents = st.lists(texts(most=16), min_size=1, max_size=3)
prices = st.sampled_from([0, 1, 4, 20, 100, 2048])


def trees_of(docs): return [tree([Row(torch.tensor([5, *w]), torch.zeros(len(w) + 1, dtype=torch.bool)) for w in words]) for words in docs]


@quick
@given(documents, prices, st.data())
def test_rectangles_cover_what_the_rule_says_once(docs, call, data):
    trees = trees_of(docs)
    says, mask = data.draw(layers(trees))
    p = plan(trees, call)
    view = p.view(**says)
    assert torch.equal(covered(view), mask.int()) and torch.equal(view.visible(), mask)
    paths = [(n, me['path']) for n, t in enumerate(trees) for me in lay_out(t.rows)[0]]
    assert torch.equal(covered(p), torch.tensor([[a == b and x[:len(y)] == y for b, y in paths] for a, x in paths]).int())


def test_a_block_that_rows_part_in_is_refused():
    t = trees_of([[[0, 1, 2, 0], [0, 1, 2, 1]]])
    with pytest.raises(ValueError, match='tokens 2 to 4 see each other both ways, but rows part among them'):
        plan(t).view(blocks=torch.tensor([-1, -1, 0, 0, 0, -1]))


# --- attention

def dense(q, k, v, mask, scale, cap, sinks):
    "One softmax over everything, as books have it."
    group = q.shape[1] // k.shape[1]
    s = q @ torch.stack([k[:, h // group] for h in range(q.shape[1])], 1).mT * scale
    if cap: s = cap * torch.tanh(s / cap)
    s = s.masked_fill(~mask, -torch.inf)
    if sinks is not None: s = torch.cat([s, sinks[None, :, None, None].expand(1, -1, q.shape[2], 1)], -1)
    p = s.softmax(-1)[..., :k.shape[2]]
    return p @ torch.stack([v[:, h // group] for h in range(q.shape[1])], 1)


@contextmanager
def only(name):
    "Every tile on one backend, if it takes the tensors."
    kept = dict(BACKENDS)
    BACKENDS['flash_cpu'] = BACKENDS[name]
    try: yield
    finally: BACKENDS.update(kept)


@few
@given(documents, prices, st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]), st.sampled_from([None, 2.]), st.booleans(), st.sampled_from([8, 12]),
       st.sampled_from(sorted(BACKENDS)), st.sampled_from([torch.float64, torch.float32]), st.data())
def test_attention_is_one_dense_softmax(docs, call, heads, cap, with_sinks, dv, name, dtype, data):
    trees = trees_of(docs)
    says, mask = data.draw(layers(trees))
    p = plan(trees, call).view(**says)
    g = torch.Generator().manual_seed(len(p))
    made = lambda *shape: (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()
    q, k, v = made(1, heads[0], len(p), 8), made(1, heads[1], len(p), 8), made(1, heads[1], len(p), dv)
    sinks = made(heads[0]) if with_sinks else None
    x = [t for t in (q, k, v, sinks) if t is not None]
    want, up = dense(q, k, v, mask, .3, cap, sinks), torch.randn(1, heads[0], len(p), dv, generator=g, dtype=torch.float64)
    low = [t.detach().to(dtype).requires_grad_() for t in x]
    with only(name):
        got = attention(*low[:3], p, .3, cap, low[3] if with_sinks else None)
        grads = torch.autograd.grad(got, low, up.to(dtype))
    close = dict(rtol=1e-11, atol=1e-11) if dtype == torch.float64 else dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got.double(), want, **close)
    for a, b in zip(grads, torch.autograd.grad(want, x, up)): torch.testing.assert_close(a.double(), b, **close)
