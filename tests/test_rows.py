"""What `to_row` writes, `to_sample` reads as the same sample: for any sample, and for the tags that a text may hold by accident."""
import json, string, tracemalloc

import datasets, pyarrow as pa, pyarrow.feather as feather, pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from omnilab.data.samples import Message, Part, RowError, Sample, read, stream, to_messages, to_row, to_sample

TAGS = ['<image>', '<audio>', '<video>', '<bbox>', '<ref-object>', '<', 'image>', '']
SIZES = [(40, 20), (20, 40)]

texts = st.lists(st.sampled_from(TAGS) | st.text(st.characters(codec='utf-8'), max_size=4), max_size=4).map(''.join)
KEYS = ['messages', 'role', 'content', 'from', 'value', 'conversations', 'images', 'image', 'objects', 'bbox', 'ref', 'type', 'text', 'prompt', 'completion',
        'system', 'history', 'query', 'response', 'loss', 'url', 'box', 'bytes', 'path']
LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(['', 'user', 'assistant', '<image>', 'a.png', 'text', 'image'])
ANYTHING = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(KEYS), x, max_size=4), max_leaves=25)

numbers = st.integers(0, 10**6) | st.floats(0, 1e6, allow_nan=False)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rows')
    for i, size in enumerate(SIZES): Image.new('RGB', size).save(folder/f'{i}.png')
    return folder


@st.composite
def conversations(draw, root, shared=()):
    "Messages with an answer; images exist, since boxes are measured in them. Behind `shared`, if there are such."
    kinds = st.lists(st.sampled_from(['text', 'text', 'image', 'audio', 'video', 'box']), max_size=4)
    roles = [] if shared else draw(st.lists(st.sampled_from(['system', 'user', 'assistant', 'tool']), max_size=3))
    roles = [*roles, 'assistant']
    layout = [draw(kinds) for _ in roles]
    before = [SIZES.index(Image.open(p.value).size) for m in shared for p in m.parts if p.type == 'image']
    images = before + [draw(st.integers(0, 1)) for kind in sum(layout, []) if kind == 'image']
    place, messages = iter(images[len(before):]), list(shared)

    def part(kind):
        if kind == 'text': return Part('text', draw(texts))
        if kind == 'image': return Part('image', str(root/f'{next(place)}.png'))
        if kind in ('audio', 'video'): return Part(kind, draw(st.sampled_from([str(root/'sub'/'a.bin'), '/elsewhere/b.bin', 'data:;base64,AA=='])))
        k = draw(st.integers(0, len(images) - 1))
        w, h = SIZES[images[k]]
        x1, y1 = draw(st.integers(0, w - 1)), draw(st.floats(0, h - 1))
        return Part('box', [x1, y1, draw(st.integers(x1 + 1, w)), h], {'size': (w, h), **({'image': k} if k else {})})

    for role, parts in zip(roles, layout):
        mine = role == 'assistant'
        more = {'loss': draw(st.sampled_from([None, True, False])), 'reasoning_content': draw(texts), 'tool_calls': draw(calls)} if mine else {}
        messages.append(Message(role, [part(k) for k in parts if k != 'box' or images], **more))
    return messages


calls = st.lists(st.builds(lambda n, v: {'type': 'function', 'function': {'name': n, 'arguments': {'x': v}}}, texts, texts), max_size=1)


@st.composite
def samples(draw, root):
    "A conversation, a pair of them, or a document; with a label and with what the template is told, or without."
    messages, rejected = draw(conversations(root)), []
    says = lambda word: [*messages[:-1], Message('assistant', (*messages[-1].parts, Part('text', word)), True)]
    shape = draw(st.sampled_from(['one', 'pair', 'document']))
    if shape == 'document': messages = [Message('document', (*messages[-1].parts, Part('text', 'yes')))]
    elif shape == 'pair' and len(messages) > 1: messages, rejected = says('yes'), draw(conversations(root, messages[:-1]))
    else: messages = says('yes')
    if rejected: rejected[-1] = Message('assistant', (*rejected[-1].parts, Part('text', 'no')), True)
    if shape == 'document':                                              # its boxes lie in its own images
        seen = [p for p in messages[0].parts if p.type == 'image']
        messages = [Message('document', [p for p in messages[0].parts if p.type != 'box' or p.meta['size'] == size_in(seen, p)])]
    keys = st.text(string.ascii_lowercase, min_size=1, max_size=3).map('x_'.__add__)         # never a name that rows use
    meta = draw(st.dictionaries(keys, st.none() | st.booleans() | numbers | texts | st.lists(texts, max_size=2), max_size=3))
    template = draw(st.sampled_from([{}, {'enable_thinking': False}, {'tools': [{'type': 'function', 'function': {'name': 'now'}}]}]))
    return Sample(messages, meta, 'a.jsonl:1', template, rejected, draw(st.sampled_from([None, True, False])))


def size_in(images, box):
    k = box.meta.get('image', 0)
    return Image.open(images[k].value).size if k < len(images) else None


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_round_trip(root, data):
    s = data.draw(samples(root))
    if any(m.role == 'assistant' and m.loss is not False and not m.text.strip() and {p.type for p in m.parts} <= {'text'} and not m.tool_calls
           for m in s.messages + s.rejected):
        with pytest.raises(RowError, match='an empty answer'): to_sample(to_row(s, root), root)
        return
    row = json.loads(json.dumps(to_row(s, root)))
    back = to_sample(row, root, s.origin)
    assert back == s
    assert to_row(back, root) == row
    for p, c in zip(back.parts, [c for m in to_messages(back) for c in m['content']]):
        assert c['type'] == p.type
        if p.type == 'box': assert all(0 <= v <= 1 for v in c['box'])


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(text=texts)
def test_a_string_is_its_pieces(text):
    "Every tag of a string is one part, every other character stays; never more, never fewer."
    n = {k: text.count(f'<{k}>') for k in ('image', 'audio', 'video', 'ref-object')}
    row = {'prompt': text.replace('<bbox>', ''), 'completion': 'x', **{f'{k}s': [f'{k}{i}' for i in range(n[k])] for k in ('image', 'audio', 'video')},
           'objects': {'ref': ['<image>'] * n['ref-object']}}
    n = {k: row['prompt'].count(f'<{k}>') for k in n}        # what taking <bbox> out has joined counts too
    row |= {f'{k}s': [f'/{k}{i}' for i in range(n[k])] for k in ('image', 'audio', 'video')} | {'objects': {'ref': ['<image>'] * n['ref-object']}}
    s = to_sample(row)
    said = ''.join(p.value if p.type == 'text' else f'<{p.type}>' for p in s.messages[0].parts)
    assert said == row['prompt'].replace('<ref-object>', '<image>')
    assert [p.value for p in s.messages[0].parts if p.type == 'image'] == row['images']
    if n['image']:
        with pytest.raises(RowError, match='without its entry'): to_sample(row | {'images': row['images'][1:]})
    with pytest.raises(RowError, match='have no tag'): to_sample(row | {'images': [*row['images'], 'more.png']})


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(row=ANYTHING)
def test_any_json_is_a_sample_or_one_line(row):
    "Whatever JSON may hold: a sample, or one line that names the row; no other error."
    try: assert isinstance(to_sample(row, origin='a.jsonl:5'), Sample)
    except RowError as e:
        assert str(e).startswith('a.jsonl:5 ') and '; expected ' in str(e) and '\n' not in str(e)


def test_files_in_both_notations_read_alike(tmp_path):
    rows = [{'prompt': f'{i}?', 'completion': 'é' * i or 'x', 'n': i} for i in range(5)]
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps(r, ensure_ascii=i % 2 == 0) + '\n' for i, r in enumerate(rows)), encoding='utf-8')
    (tmp_path/'a.json').write_text(json.dumps(rows, indent=2), encoding='utf-8')
    lines, array = read(tmp_path/'a.jsonl'), read(tmp_path/'a.json')
    assert [(s.messages, s.meta) for s in lines] == [(s.messages, s.meta) for s in array]
    assert [s.origin.split(':')[-1] for s in lines] == ['1', '2', '3', '4', '5']
    assert [s.origin.split(':')[-1] for s in array] == ['2', '7', '12', '17', '22']


WRITERS = {
    'jsonl': lambda rows, p: p.write_text('\n'.join(map(json.dumps, rows))), 'json': lambda rows, p: p.write_text(json.dumps(rows, indent=1)),
    'csv': lambda rows, p: table(rows).to_pandas().to_csv(p, index=False), 'tsv': lambda rows, p: table(rows).to_pandas().to_csv(p, index=False, sep='\t'),
    'parquet': lambda rows, p: pq.write_table(table(rows), p, row_group_size=3), 'feather': lambda rows, p: feather.write_feather(table(rows), p),
    'folder': lambda rows, p: datasets.Dataset.from_list(rows).save_to_disk(p)}


def table(rows): return pa.Table.from_pylist(rows)


@pytest.mark.parametrize('ending', WRITERS)
def test_every_table_gives_the_same_samples(tmp_path, ending):
    "Whole, in shares, and from the middle: the same samples under the same indices."
    rows = [{'prompt': f'"{i}",\n?', 'completion': '007, NA', 'n': str(i)} for i in range(10)]
    path = tmp_path/f'a.{ending}'
    WRITERS[ending](rows, path)
    whole = read(path)
    assert [(s.messages, s.meta) for s in whole] == [(s.messages, s.meta) for s in map(to_sample, rows)]
    assert len({s.origin for s in whole}) == 10 and all(s.origin.startswith(str(path)) for s in whole)
    shares = [dict(stream(path, shard=(i, 3))) for i in range(3)]
    assert {k: s for share in shares for k, s in share.items()} == dict(enumerate(whole)) and [*shares[1]] == [1, 4, 7]
    again = stream(path, start=4, shard=(1, 2))
    assert list(again) == list(again) == [(k, whole[k]) for k in (5, 7, 9)]
    if ending == 'parquet': assert len(again) == 3
    else: pytest.raises(TypeError, len, again)


def test_media_inside_tables_stay_files(root, tmp_path):
    "Bytes of a picture in Parquet, a folder with metadata, and 🤗 features: one image, undecoded."
    png = (root/'0.png').read_bytes()
    row = {'prompt': '<image>What?', 'completion': 'x'}
    pq.write_table(table([row | {'image': {'bytes': png, 'path': '0.png'}}]), tmp_path/'a.parquet')
    assert read(tmp_path/'a.parquet')[0].messages[0].parts[0].value == png
    ds = datasets.Dataset.from_list([row | {'image': str(root/'0.png')}]).cast_column('image', datasets.Image())
    for d in ds, ds.to_iterable_dataset(): assert read(d)[0].messages[0].parts[0].value == str(root/'0.png')
    (tmp_path/'metadata.jsonl').write_text(json.dumps(row | {'file_name': '0.png'}))
    (tmp_path/'0.png').write_bytes(png)
    s = read(tmp_path)[0]
    assert s.messages[0].parts[0].value == str(tmp_path/'0.png') and s.origin == f'{tmp_path}/metadata.jsonl:1'


def test_lines_are_streamed_in_little_memory(tmp_path):
    "A share of a long file costs a line of memory, not the file."
    line = json.dumps({'prompt': 'Hi', 'completion': 'x' * 10_000})
    (tmp_path/'long.jsonl').write_text('\n'.join([line] * 3000))        # 30 MB
    tracemalloc.start()
    n = sum(1 for _ in stream(tmp_path/'long.jsonl', shard=(1, 4)))
    assert n == 750 and tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_a_pair_whose_worse_answer_has_pictures_of_its_own(root):
    "What the rejected answer shows is neither lost nor mixed up with what the chosen one shows."
    asked = Message('user', [Part('image', str(root/'0.png')), Part('text', 'Draw it turned.')])
    box = Part('box', [0, 0, 20, 40], {'size': (20, 40), 'image': 1})
    worse = [asked, Message('assistant', [Part('image', str(root/'1.png')), Part('text', 'There: '), box])]
    for better in [Part('text', 'I cannot.')], [Part('image', str(root/'0.png')), Part('text', '<image>')]:
        s = Sample([asked, Message('assistant', better)], rejected=worse)
        assert to_sample(json.loads(json.dumps(to_row(s, root))), root) == s


def test_boxes_in_words_train_a_published_family(root):
    "Its template leaves boxes out, which is said; spelled, the answer's numbers are learned."
    import families, transformers
    from omnilab.data.samples import spell_boxes
    from omnilab.forest.context import Encoder
    from omnilab.forest.encode import EncodeError, encode
    model, processor = families.qwen2_5_vl(transformers)
    row = {'query': '<image>where is <ref-object> ?', 'response': 'here <bbox>', 'images': ['0.png'], 'objects': {'ref': ['one'], 'bbox': [[4, 2, 20, 10]]}}
    sample, enc = to_sample(row, root, 'a.jsonl:1'), Encoder(processor, model)
    with pytest.raises(EncodeError, match=r'a.jsonl:1 messages\[1\]: box in a message .* leaves it out'): encode(sample, enc)
    (r,), (plain,) = encode(spell_boxes(sample, 'thousandths'), enc), encode(to_sample({**row, 'response': 'here [100, 100, 500, 500]', 'objects': None}
                                                                                       | {'query': '<image>where is one ?'}, root), enc)
    assert r.ids.tolist() == plain.ids.tolist() and r.target.tolist() == plain.target.tolist()
