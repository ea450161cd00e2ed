"""A thousand and more ways to hurt rows, files and tables: each gives one precise line or a valid sample; nothing crashes, hangs or changes silently."""
import copy, io, json, os, random, signal, warnings

import numpy as np, pyarrow as pa, pyarrow.parquet as pq
import pytest, soundfile
from PIL import Image

from omnilab.data.media import Audio, MediaError, Video, load, peek, save_audio, save_image, save_video
from omnilab.data.samples import RowError, Sample, decode, read, stream, to_messages, to_row, to_sample
from omnilab.data.tables import rows

NOISE = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
CHAT = [{'role': 'user', 'content': '<image>What is it?'}, {'role': 'assistant', 'content': 'A cat.'}]
CALL = {'id': 'c', 'type': 'function', 'function': {'name': 'now', 'arguments': {'zone': 'UTC'}}}
ROWS = [
    {'messages': CHAT, 'images': ['a.png'], 'channel': 'x', 'id': 7},
    {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'a.png', 'detail': 'auto'}}, {'type': 'text', 'text': 'Hi'}]},
                  CHAT[1]]},
    {'messages': [{'role': 'user', 'content': [{'type': 'input_audio', 'input_audio': {'data': 'AAAA', 'format': 'wav'}}]},
                  {**CHAT[1], 'loss': False}, *CHAT], 'image': 'a.png'},
    {'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Time?'}, {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
                  {'role': 'tool', 'content': '12:00', 'tool_call_id': 'c'}, {'role': 'assistant', 'content': 'Noon.', 'reasoning_content': 'hm'}],
     'tools': [CALL['function']]},
    {'conversations': [{'from': 'human', 'value': '<image>Where?'}, {'from': 'gpt', 'value': '<bbox>'}], 'image': ['a.png'],
     'objects': {'bbox': [[1, 2, 9, 9]], 'ref': []}},
    {'instruction': 'Add.', 'input': '1 and 2', 'output': '3', 'history': [['Hi', 'Hello']], 'system': 'Count.'},
    {'query': '<audio><video>What?', 'response': 'A film.', 'audios': ['a.wav'], 'videos': ['a.mp4'], 'rejected_response': 'No.'},
    {'prompt': CHAT[:1], 'chosen': CHAT[1:], 'rejected': [{'role': 'assistant', 'content': 'A dog.'}],
     'images': [{'bytes': None, 'path': 'a.png'}]},
    {'prompt': 'Hi', 'completion': 'Hello', 'label': True, 'chat_template_kwargs': {'enable_thinking': False}},
    {'text': 'Once <image> upon <audio>', 'images': ['a.png'], 'audios': ['a.wav']},
    {'text': 'a cat', 'image_path': 'a.png', 'audio_path': 'a.wav'},
]
HOSTILE = [None, True, 0, -1, 1e308, float('nan'), float('inf'), '', ' ', '\0', '\ud800', 'x' * 100_000, [], {}, [[]], [None], {'': None}, {'url': 7},
           '<image>', '<bbox>' * 9,
           '../../etc/passwd', '/dev/zero', '/dev/stdin', '/etc/passwd', 'pipe', 'loop', 'a.png/b', '.', '~', 'a.png\0.txt', 'x' * 5000,
           'data:', 'data:image/png;base64,////',
           'http://127.0.0.1:1/a.png', 'file:///etc/passwd', 'hf:a/b', '{"a":', '[1', '[' * 5000, 'role', {'role': 'user'},
           {'type': 'image'}, {'bytes': 'a', 'path': 7}, 'sick.png']


def remux(src, dst):
    "The same pictures and sound in another container."
    import av
    with av.open(str(src)) as a, av.open(str(dst), 'w') as b:
        new = {s.index: b.add_stream_from_template(s) for s in a.streams}
        for p in a.demux():
            if p.dts is not None: p.stream = new[p.stream.index]; b.mux(p)


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    at = tmp_path_factory.mktemp('fuzz')
    save_image(Image.fromarray(NOISE), at/'a.png')
    save_image(Image.fromarray(NOISE), at/'a.jpg')
    tone = Audio(.5 * np.sin(np.arange(2000)), 8000)
    save_audio(tone, at/'a.wav')
    save_audio(tone, at/'a.flac')
    soundfile.write(at/'a.ogg', tone.wave, 8000)
    save_video(Video(np.repeat(NOISE[None], 3, 0), 4., tone), at/'a.mp4')
    remux(at/'a.mp4', at/'a.mkv')
    for n, form in ('a.gif', 'GIF'), ('a.webp', 'WEBP'), ('a.bmp', 'BMP'), ('a.tiff', 'TIFF'): Image.fromarray(NOISE).save(at/n, form)
    (at/'sick.png').write_bytes((at/'a.png').read_bytes()[:300])
    os.mkfifo(at/'pipe')
    os.symlink('loop', at/'loop')
    return at

NAMES = 'extra images image text messages content loss label rejected tools type objects system'.split()


@pytest.fixture(autouse=True)
def no_hang():
    "What waits for a pipe or reads an endless device never comes back: the alarm says so."
    def late(*_): raise TimeoutError('it hangs')
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_line(e, start=''):
    "The form of every complaint."
    said = str(e)
    assert said.startswith(start[:150]) and '; expected ' in said and said.isprintable() and len(said) < 1000, said[:1500]


def places(x, at=()):
    "Every place in a JSON value."
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from places(v, (*at, k))


def hurt(row, dice):
    "One to three changes of a row: a value replaced, dropped, doubled, wrapped, or joined by an unknown one."
    row = copy.deepcopy(row)
    for _ in range(dice.choice([1, 1, 2, 3])):
        at = dice.choice([p for p in places(row) if p])
        box, how = row, dice.randrange(8)
        for k in at[:-1]: box = box[k]
        k, value = at[-1], copy.deepcopy(dice.choice(HOSTILE))
        if how < 4: box[k] = value
        elif how == 4: del box[k]
        elif how == 5: box[k] = [box[k], box[k]]
        elif how == 6: box[k] = str(box[k])
        elif isinstance(box, list): box.insert(k, value)
        else: box[dice.choice(NAMES)] = value
        if not row: break
    return row


def check(sample, root):
    "A valid sample: chat templates can be given it, and it can be written and read back."
    assert isinstance(sample, Sample)
    if not sample.document: to_messages(sample)
    try: row = to_row(sample, root)
    except RowError as e: one_line(e, sample.origin); return
    again = to_sample(row, root, sample.origin, answer=False)
    assert repr(again) == repr(sample)                    # by repr: a NaN in a column is not equal to itself


def test_the_rows_are_good(shelf):
    "What is hurt below was whole: every row is a sample with something in it, and its media can be decoded."
    for row in ROWS:
        s = to_sample(row, shelf)
        assert s.parts and s.messages
        if 'AAAA' not in str(row): assert len(decode(s).parts) == len(s.parts)


@pytest.mark.parametrize('seed', range(8))
def test_rows(shelf, seed):
    "200 rows, in one file: every one is a sample or a problem, under its own line."
    dice = random.Random(seed)
    hurts = [hurt(dice.choice(ROWS), dice) for _ in range(200)]
    path = shelf/f'{seed}.jsonl'
    path.write_text('\n'.join(map(json.dumps, hurts)))
    with warnings.catch_warnings(action='ignore'): d = read(path, on_error='skip')
    origins = [f'{path}:{n}' for n in range(1, 201)]
    assert sorted([s.origin for s in d] + [p.origin for p in d.problems]) == sorted(origins)
    for p in d.problems: one_line(p, p.origin + ' ')
    for s in d: check(s, shelf)
    assert len(d) > 15 and len(d.problems) > 50           # both happen
    flowed = [r for _, r in stream(path)]
    assert [(r.origin, isinstance(r, Sample)) for r in flowed] == [(o, o in {s.origin for s in d}) for o in origins]


@pytest.mark.parametrize('seed', range(2))
def test_values_that_json_has_not(shelf, seed):
    "Rows from memory may hold anything."
    dice = random.Random(seed)
    odd = [b'', b'\x89PNG', object(), {1, 2}, np.zeros((2, 2)), np.uint8([1]), Image.new('RGB', (2, 2)), Audio([0.], 8000), print, 1j, (), {3: 4}, float('nan')]
    for _ in range(100):
        row = hurt(dice.choice(ROWS), dice)
        if not row: continue
        at = dice.choice([p for p in places(row) if p])
        box = row
        for k in at[:-1]: box = box[k]
        box[at[-1]] = dice.choice(odd)
        try: sample = to_sample(row, shelf, 'memory:1')
        except RowError as e: one_line(e, 'memory:1 '); continue
        assert isinstance(sample, Sample)


ARRAYS = [np.zeros((2, 2)), np.zeros((2, 2, 3), np.uint8), np.uint8([1]), np.array('a.png'), np.array(['a.png'], object), np.zeros((0, 0, 3), np.uint8),
          np.array(None)]
SOUNDS = [{'array': a, 'sampling_rate': r, **more} for a in ([0., 1.], [[0.], [1.]], ['x'], [], [float('nan')], None, np.zeros(3, np.int16), 7)
          for r, more in ((8000, {}), (8000, {'path': None}), (0, {}), (-1, {}), ('8000', {}), (8e3, {}), (None, {}), (True, {'more': 1}))]


def test_media_of_bare_numbers(shelf):
    "What 🤗 Datasets and notebooks hold in memory, in every place where a row may name a medium: a sample that can be decoded, or one line."
    good = 0
    for kind, values in ('image', ARRAYS + SOUNDS[:2]), ('audio', SOUNDS + ARRAYS), ('video', ARRAYS):
        for v in values:
            typed = {'messages': [{'role': 'user', 'content': [{'type': kind, kind: v}]}, CHAT[1]]}
            rows_of = [{'query': f'<{kind}>What?', 'response': 'x', f'{kind}s': [v]}, {'query': f'<{kind}>What?', 'response': 'x', kind: v},
                       {'text': 'x', f'{kind}_path': v}, typed]
            if kind == 'image': rows_of.append({**ROWS[4], 'image': [v]})                      # a box is measured by it
            for row in rows_of:
                try: good += bool(decode(to_sample(row, shelf, 'memory:1')))
                except RowError as e: one_line(e, 'memory:1 ')
    assert good > 10


INSERTED = [b'\0', b'\xff', b'\xef\xbb\xbf', b'"', b'{', b'\\', b'\\ud800', b'NaN', b'-', b'1e999', b'9' * 5000, b'[' * 3000]


@pytest.mark.parametrize('seed', range(2))
def test_lines(shelf, seed):
    "150 lines hurt byte by byte: cut, changed, doubled, with parts of others."
    dice, lines = random.Random(seed), []
    for _ in range(150):
        b = bytearray(json.dumps(dice.choice(ROWS)).encode())
        how, i = dice.randrange(6), dice.randrange(len(b))
        if how == 0: b = b[:i]
        elif how == 1: b[i] = dice.randrange(256)
        elif how == 2: b[i:i] = dice.choice(INSERTED)
        elif how == 3: b[i:i] = b[:i]
        elif how == 4: del b[i:i + 3]
        else: b = b[:-1] + b', ' + b[1:]
        lines.append(bytes(b).replace(b'\n', b' ').replace(b'\r', b' ') or b'{')
    path = shelf/f'lines{seed}.jsonl'
    path.write_bytes(b'\n'.join(lines))
    with warnings.catch_warnings(action='ignore'): d = read(path, on_error='skip')
    assert len(d) + len(d.problems) == sum(bool(line.strip()) for line in lines)
    for p in d.problems: one_line(p, p.origin + ' ')
    for s in d: check(s, shelf)


KINDS = {'a.png': 'image', 'a.jpg': 'image', 'a.gif': 'image', 'a.webp': 'image', 'a.bmp': 'image', 'a.tiff': 'image',
         'a.wav': 'audio', 'a.flac': 'audio', 'a.ogg': 'audio', 'a.mp4': 'video', 'a.mkv': 'video'}


def same(a, b): return np.array_equal(np.asarray(a), np.asarray(b)) if isinstance(a, Image.Image) else a == b


@pytest.mark.parametrize('name', KINDS)
def test_media(shelf, name):
    "50 of each format: cut (never taken for whole), changed, joined with another's, of another kind."
    dice, kind, whole = random.Random(name), KINDS[name], (shelf/name).read_bytes()
    others, good = [(shelf/n).read_bytes() for n in KINDS if n != name], load(whole, kind)
    for k in range(50):
        b, i = bytearray(whole), dice.randrange(len(whole))
        if k < 20: b = b[:i]
        elif k < 40:
            for _ in range(dice.choice([1, 4, 30])): b[dice.randrange(dice.choice([64, len(b)]))] = dice.randrange(256)
        elif k < 45: b = b[:i] + dice.choice(others)[i:]
        else: b = dice.choice(others)
        for see in peek, load:
            try: medium = see(bytes(b), dice.choice([kind, kind, 'image', 'audio', 'video']) if k >= 45 else kind)
            except MediaError as e: one_line(e)
            else: assert see is peek or k >= 20 or same(medium, good), f'{i} of {len(whole)} bytes were taken for all'


@pytest.mark.parametrize('name', ['a.parquet', 'a.arrow', 'a.feather', 'a.csv', 'a.json'])
def test_tables(shelf, name):
    "60 of each: bytes changed or lost; every row that comes out is a row, and what can't be read is one line."
    numbers = [{'prompt': f'What is {i}?', 'completion': 'x' * i + 'é', 'n': i, 'more': [{'a': str(i)}]} for i in range(20)]
    table = pa.Table.from_pylist(numbers)
    path, out, dice = shelf/name, io.BytesIO(), random.Random(name)
    if name == 'a.parquet': pq.write_table(table, out, row_group_size=7)
    elif name == 'a.csv': out.write(table.drop_columns('more').to_pandas().to_csv(index=False).encode())
    elif name == 'a.json': out.write(json.dumps(table.to_pylist(), indent=1).encode())
    else:
        with (pa.ipc.new_file if name == 'a.feather' else pa.ipc.new_stream)(out, table.schema) as w: w.write_table(table, max_chunksize=7)
    path.write_bytes(whole := out.getvalue())
    good = [f.row for f in rows(path)]
    assert len(good) == 20
    for k in range(60):
        b = bytearray(whole)
        if k < 20: b = b[:dice.randrange(len(b))]
        else:
            for _ in range(dice.choice([1, 3, 20])): b[dice.randrange(len(b))] = dice.randrange(256)
        path.write_bytes(b)
        found = []
        try: found += rows(path)
        except RowError as e: one_line(e, str(path))
        assert [f.index for f in found] == list(range(len(found)))
        for f in found:
            if isinstance(f.row, RowError): one_line(f.row, f.origin + ' ')
            elif k < 20 and name != 'a.csv': assert f.row == good[f.index]       # a CSV has no mark of its end
        if b: read_or_line(path)


def read_or_line(path):
    try:
        with warnings.catch_warnings(action='ignore'): d = read(path, on_error='skip')
    except RowError as e: one_line(e, str(path)); return
    for p in d.problems: one_line(p, p.origin + ' ')


NOWHERE = ['no.jsonl', '', '.', 'pipe', 'loop', 'a.png', 'a.png/b', 'a\0b', 'x' * 5000, '*', '[', '../*/no?.parquet', '/dev/zero', '/dev/null', '/dev/stdin']


@pytest.mark.parametrize('name', NOWHERE)
def test_names_of_tables(shelf, name):
    with pytest.raises(RowError) as e: read(os.path.join(shelf, name))
    one_line(e.value)


ADDRESSES = ['hf:', 'hf:#', 'hf:../..', 'hf:/etc/passwd', 'hf:a\nb', 'hf:nobody/nothing', 'hf:json:x#y', 'hf:' + 'x' * 5000]


@pytest.mark.parametrize('name', ADDRESSES)
def test_addresses_of_the_hub(name, monkeypatch):
    import datasets, huggingface_hub.constants
    for module, flag in (datasets.config, 'HF_HUB_OFFLINE'), (huggingface_hub.constants, 'HF_HUB_OFFLINE'): monkeypatch.setattr(module, flag, True)
    with pytest.raises(RowError) as e: read(name)
    one_line(e.value)


def test_nothing_is_left_open(shelf):
    "Readers that were given up close their files."
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else pytest.skip('needs /proc')
    (shelf/'open.jsonl').write_text('{"prompt": "Hi", "completion": "Hello"}\n' * 3)
    for _ in range(20): next(iter(stream(shelf/'open.jsonl')))
    assert len(os.listdir('/proc/self/fd')) <= before + 1
