"""Every kind of bad row: one line with file, line, field and what was expected; skipped rows are counted, named and never replaced."""
import base64, json, os, struct, subprocess, sys, threading, warnings, zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import soundfile
from PIL import Image

from omnilab.data.media import Audio, Limits, MediaError, Video, load_audio, load_image, load_video, save_audio, save_image, save_video
from omnilab.data.samples import RowError, decode, read, to_sample

GOOD = [{'prompt': '<image>What is it?', 'completion': 'A cat.', 'images': ['cat.png'], 'id': i} for i in range(2)]
SOUND = Audio(.5 * np.sin(np.arange(8000)), 8000)
NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)


def png(width, height):
    "All header: what it promises isn't there."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


def wav(seconds, rate=8000):
    "A header of silence so long; the samples are to be added as a hole in the file."
    n = seconds * rate * 2
    return b'RIFF' + struct.pack('<I', 36 + n) + b'WAVEfmt ' + struct.pack('<IHHIIHH', 16, 1, 1, rate, 2 * rate, 2, 16) + b'data' + struct.pack('<I', n), 44 + n


@pytest.fixture(scope='session')
def shelf(tmp_path_factory):
    "Healthy files and sick ones."
    at = tmp_path_factory.mktemp('shelf')
    save_image(Image.new('RGB', (40, 20), 'orange'), at/'cat.png')
    save_image(Image.fromarray(NOISE), at/'noise.png')
    save_image(Image.fromarray(NOISE), at/'noise.jpg')
    save_audio(SOUND, at/'tone.wav')
    save_audio(SOUND, at/'tone.flac')
    save_video(Video(np.repeat(NOISE[None], 6, 0), 4., SOUND), at/'film.mp4')
    whole = {p.name: p.read_bytes() for p in at.iterdir()}

    def write(name, data, size=None):
        (at/name).write_bytes(data)
        if size: os.truncate(at/name, size)

    b = bytearray(whole['noise.png'])
    b[len(b)//2:len(b)//2 + 50] = bytes(50)
    write('hurt.png', b)                                                        # damaged inside; header and end are fine
    for name in 'noise.png', 'noise.jpg', 'tone.wav', 'tone.flac', 'film.mp4': write(f'half_{name}', whole[name][:len(whole[name])//2])
    write('late_film.mp4', whole['film.mp4'].replace(b'moov', b'junk'))         # the index is lost
    write('no_number.wav', whole['tone.wav'])
    soundfile.write(at/'nan.wav', np.full(100, np.nan, np.float32), 8000, subtype='FLOAT')
    soundfile.write(at/'none.wav', np.zeros(0, np.float32), 8000)
    write('empty.png', b'')
    write('words.png', b'This is no picture at all.')
    write('list.mp4', b'#EXTM3U\nhttp://127.0.0.1/secret.ts\n')
    write('sound.png', whole['tone.wav'])
    write('picture.wav', whole['cat.png'])
    write('picture.mp4', whole['cat.png'])
    write('page.png', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    write('large.png', whole['cat.png'], 1_000_000_001)                         # holes: they take no room on disk
    write('bomb.png', png(9_000, 9_000))
    write('huge.png', png(60_000, 60_000))
    write('long.wav', *wav(3601))
    Image.new('RGB', (8, 8)).save(at/'two.gif', save_all=True, append_images=[Image.new('RGB', (8, 8), 'red')])
    os.mkdir(at/'folder.png')
    return at


def medium(kind, name): return {'prompt': f'<{kind}>What?', 'completion': 'x', f'{kind}s': [name]}


def chat(*messages, **columns): return {'messages': [dict(zip(('role', 'content'), m)) | dict(*m[2:]) for m in messages], **columns}


U, A = ('user', 'Hi'), ('assistant', 'Hello')
BOX = {'prompt': '<image>Where?', 'completion': '<bbox>', 'images': ['cat.png']}

# what the row is, and what the line must say after 'FILE:2 '
HEADERS = {
    'missing': (medium('image', 'no.png'), 'images[0]: {}/no.png: No such file or directory; expected a file'),
    'missing sound': (medium('audio', 'no.wav'), 'audios[0]: {}/no.wav: No such file'),
    'a folder': (medium('image', 'folder.png'), 'images[0]: {}/folder.png: not a file; expected a file'),
    'an empty file': (medium('image', 'empty.png'), 'images[0]: {}/empty.png: empty; expected image as png'),
    'words': (medium('image', 'words.png'), 'images[0]: {}/words.png: of no known format; expected image as png'),
    'a script': (medium('image', 'page.png'), 'of no known format; expected image as png'),
    'a playlist': (medium('video', 'list.mp4'), 'videos[0]: {}/list.mp4: of no known format; expected video as mp4'),
    'a sound called .png': (medium('image', 'sound.png'), 'images[0]: {}/sound.png: holds wav; expected image as png'),
    'a picture called .wav': (medium('audio', 'picture.wav'), 'audios[0]: {}/picture.wav: holds png; expected audio as wav'),
    'a picture called .mp4': (medium('video', 'picture.mp4'), 'videos[0]: {}/picture.mp4: holds png; expected video as mp4'),
    'half a png': (medium('image', 'half_noise.png'), 'images[0]: {}/half_noise.png: torn png, its end is missing; expected a whole image file'),
    'half a jpeg': (medium('image', 'half_noise.jpg'), 'torn jpeg, its end is missing; expected a whole image file'),
    'half a wav': (medium('audio', 'half_tone.wav'), 'torn, 7978 of 16000 bytes of sound; expected a whole audio file'),
    'half an mp4': (medium('video', 'half_film.mp4'), 'videos[0]: {}/half_film.mp4: torn mp4, '),
    'an mp4 without index': (medium('video', 'late_film.mp4'), 'expected a whole video file'),
    'an mp4 as a sound': (medium('audio', 'late_film.mp4'), 'expected a whole audio file'),
    'a large file': (medium('image', 'large.png'), 'large.png: 1,000,000,001 bytes; expected at most 1,000,000,000 (settings: media.max_bytes)'),
    'too many pixels': (medium('image', 'bomb.png'), 'bomb.png: 81,000,000 pixels; expected at most 64,000,000 (settings: media.max_pixels)'),
    'a bomb': (medium('image', 'huge.png'), 'huge.png: 3,600,000,000 pixels; expected at most 64,000,000 (settings: media.max_pixels)'),
    'a long sound': (medium('audio', 'long.wav'), 'long.wav: 3,601 seconds; expected at most 3,600 (settings: media.max_seconds)'),
    'an animation': (medium('image', 'two.gif'), '2 pictures in one file; expected one'),
    'a url': (medium('image', 'https://a.org/b.png'), 'images[0]: https://a.org/b.png: a URL; expected a local file'),
    'another scheme': (medium('image', 'file:///etc/hosts'), 'a URL; expected a local file'),
    'half a data uri': (medium('image', 'data:image/png;base64,abc'), 'broken base64'),
    'a data uri of words': (medium('image', 'data:image/png;base64,SGVsbG8='), 'of no known format'),
    'a name too long': (medium('image', 'x' * 5000), 'File name too long; expected a file'),
    'a null in a name': (medium('image', 'a\0.png'), 'null byte; expected a file'),
    'of an image of a list': (chat(('user', [{'type': 'image', 'image': 'no.png'}]), A), 'messages[0].content[0].image: {}/no.png: No such file'),
    'of the answer': ({'prompt': 'Draw.', 'completion': '<image>', 'images': ['no.png']}, 'images[0]: {}/no.png: No such file'),
    'of a box': (BOX | {'images': ['no.png'], 'objects': {'bbox': [[0, 0, 1, 1]]}}, 'images[0]: {}/no.png: No such file'),
}

INSIDE = {
    'a png hurt inside': (medium('image', 'hurt.png'), 'images[0]: {}/hurt.png: broken png ('),
    'half a flac': (medium('audio', 'half_tone.flac'), 'audios[0]: {}/half_tone.flac: broken flac ('),
    'samples that are no numbers': (medium('audio', 'nan.wav'), 'samples that are not numbers; expected samples within'),
    'no samples': (medium('audio', 'none.wav'), 'no sound in it; expected at least one sample'),
}

ROWS = {
    'no object': (7, 'row: 7; expected an object'),
    'a list': ([U, A], 'row: ['),
    'no known columns': ({'caption': 'a cat'}, 'columns: caption; expected messages, conversations, prompt and completion'),
    'an empty object': ({}, 'columns: none; expected messages'),
    'messages as text': ({'messages': 'Hi'}, "messages: 'Hi'; expected a list of messages"),
    'a message as text': ({'messages': ['Hi']}, "messages[0]: 'Hi'; expected {\"role\""),
    'content as number': (chat(('user', 7), A), 'messages[0].content: 7; expected a text, or a list of typed parts'),
    'no content': (chat(U, ('assistant', None)), 'messages[1].content: None; expected a text'),
    'an unknown role': (chat(('robot', 'Hi'), A), "messages[0].role: 'robot'; expected one of system, user, assistant, tool"),
    'a role as number': (chat((1, 'Hi'), A), 'messages[0].role: 1; expected one of'),
    'an unknown sharegpt role': ({'conversations': [{'from': 'robot', 'value': 'x'}]}, "conversations[0].from: 'robot'; expected one of"),
    'an unknown key': (chat(('user', 'Hi', {'age': 7}), A), 'messages[0].age: unknown; expected role, content, loss'),
    "a user's name": (chat(('user', 'Hi', {'name': 'Eve'}), A), "messages[0].name: given in a message of role 'user'; expected it in one of role 'tool'"),
    'calls of a user': (chat(('user', 'Hi', {'tool_calls': [{'name': 'now'}]}), A), "messages[0].tool_calls: given in a message of role 'user'"),
    'a call without a name': (chat(U, ('assistant', '', {'tool_calls': [{'arguments': {}}]})), "messages[1].tool_calls[0]: {'arguments'"),
    'arguments that are no JSON': (chat(U, ('assistant', '', {'tool_calls': [{'name': 'now', 'arguments': '{'}]})), "messages[1].tool_calls[0].arguments: '{'"),
    'tools as a name': ({**chat(U, A), 'tools': 'weather'}, "tools: 'weather'; expected a list of functions, or that as JSON"),
    'loss as text': (chat(U, ('assistant', 'x', {'loss': 'no'})), "messages[1].loss: 'no'; expected true or false"),
    'an unknown part': (chat(('user', [{'type': 'smell'}]), A), "messages[0].content[0].type: 'smell'; expected text, image"),
    'a part without type': (chat(('user', [{'text': 'Hi'}]), A), 'messages[0].content[0].type: None; expected the type of a part'),
    'an option of a part': (chat(('user', [{'type': 'image', 'image': 'cat.png', 'max_pixels': 9}]), A), 'messages[0].content[0].max_pixels: unknown'),
    'an image as number': (medium('image', 7), 'images[0]: 7; expected image as a path'),
    'an image as nothing': (medium('image', ''), 'images[0]: an empty path; expected image as a path'),
    'an image as null': (medium('image', None), 'images[0]: None; expected image as a path'),
    'images as number': ({'prompt': '<image>', 'completion': 'x', 'images': 7}, 'images: 7; expected image as a path'),
    'two columns': (medium('image', 'cat.png') | {'image': 'cat.png'}, 'image: given beside images; expected one column'),
    'a tag without file': ({'prompt': '<image>?', 'completion': 'x'}, 'prompt: a tag <image> without its entry; expected as many entries in images'),
    'more tags than files': (chat(('user', '<image><image>'), A, images=['cat.png']), 'messages[0].content: a tag <image> without its entry'),
    'another kind of file': ({'prompt': '<audio>?', 'completion': 'x', 'images': ['cat.png']}, 'prompt: a tag <audio> without its entry'),
    'more files than tags': (medium('image', 'cat.png') | {'images': ['cat.png'] * 3}, 'images[1]: 2 of 3 entries have no tag; expected a tag <image>'),
    'files, no tags': ({'prompt': 'What?', 'completion': 'x', 'videos': ['film.mp4']}, 'videos[0]: 1 of 1 entries have no tag; expected a tag <video>'),
    'a box without entry': (BOX, 'completion: a tag <bbox> without its entry; expected as many entries in objects.bbox'),
    'a point': (BOX | {'objects': {'bbox': [[1, 2]]}}, 'objects.bbox[0]: [1, 2]; expected four numbers [x1, y1, x2, y2]'),
    'a box of text': (BOX | {'objects': {'bbox': [['1', 2, 3, 4]]}}, "objects.bbox[0]: ['1', 2, 3, 4]; expected four numbers"),
    'a box upside down': (BOX | {'objects': {'bbox': [[9, 9, 1, 1]]}}, 'objects.bbox[0]: [9, 9, 1, 1]; expected 0 ≤ x1 < x2 ≤ 40 and 0 ≤ y1 < y2 ≤ 20'),
    'a box outside': (BOX | {'objects': {'bbox': [[0, 0, 50, 10]]}}, 'objects.bbox[0]: [0, 0, 50, 10]; expected 0 ≤ x1 < x2 ≤ 40'),
    'a box in no image': (BOX | {'objects': {'bbox': [[0, 0, 1, 1]], 'image_id': [1]}}, 'objects.bbox[0]: a box in image 1; expected the image'),
    'objects as list': (BOX | {'objects': [[0, 0, 1, 1]]}, 'objects: [[0, 0, 1, 1]]; expected {'),
    'an empty answer': (chat(U, ('assistant', ' \n')), 'messages[1].content: an empty answer; expected something to train on'),
    'an empty list of parts': (chat(U, ('assistant', [])), 'messages[1].content: an empty answer; expected something to train on'),
    'an empty earlier answer': (chat(U, ('assistant', ''), U, A), 'messages[1].content: an empty answer'),
    'no answer': (chat(U), "messages[0].content: no assistant's message; expected an answer to train on"),
    'no completion': ({'prompt': 'Hi'}, "prompt: no assistant's message; expected an answer to train on"),
    'no messages': ({'messages': []}, "messages: no assistant's message; expected an answer to train on"),
    'the question last': (chat(U, A, U), "messages[2].content: the conversation ends with the user's message; expected the assistant's answer"),
    'nothing trained': (chat(U, ('assistant', 'x', {'loss': False})), 'messages[1].content: no answer is trained (loss is false); expected one that is'),
    'half a character': (chat(U, ('assistant', '\ud83d')), "messages[1].content: a character that is none, '\\ud83d'; expected text that UTF-8 can hold"),
}

LINES = {
    'no json': (b'{"prompt": "Hi"', "line: not JSON (Expecting ',' delimiter at column 16); expected one JSON object on a line, in UTF-8"),
    'two objects': (b'{} {}', 'line: not JSON (Extra data at column 4); expected one JSON object'),
    'no utf-8': (b'{"prompt": "caf\xe9", "completion": "x"}', 'line: byte 0xe9 at column 16 is not UTF-8; expected one JSON object on a line, in UTF-8'),
    'utf-16': ('{"prompt": "Hi"}'.encode('utf-16'), 'line: byte 0xff at column 1 is not UTF-8'),
    'a key twice': (b'{"prompt": "a", "completion": "x", "prompt": "b"}', "line: not JSON that can be used (the key 'prompt' twice)"),
    'very deep': (b'[' * 100_000, 'line: not JSON that can be used ('),
    'binary': (bytes(range(256)).replace(b'\n', b''), 'line: byte 0x80 at column 128 is not UTF-8'),
}

CASES = [(n, json.dumps(row).encode(), says, True) for n, (row, says) in (HEADERS | ROWS).items()]
CASES += [(n, json.dumps(row).encode(), says, 'decode') for n, (row, says) in INSIDE.items()] + [(n, line, says, True) for n, (line, says) in LINES.items()]


@pytest.mark.parametrize('line, says, check', [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_one_line(shelf, line, says, check):
    "A bad row between two good ones: `raise` says where, `skip` keeps the good ones as they are."
    path = shelf/'data.jsonl'
    good = [json.dumps(r).encode() for r in GOOD]
    path.write_bytes(b'\n'.join([good[0], line, good[1]]) + b'\n')
    with pytest.raises(RowError) as e: read(path, check_media=check)
    said = str(e.value)
    assert said.startswith(f'{path}:2 ') and says.replace('{}', str(shelf)) in said.removeprefix(f'{path}:2 ')
    assert '; expected ' in said and said.isprintable() and '\n' not in said and len(said) < 600
    with pytest.warns(UserWarning, match='1 of 3 rows skipped') as w: d = read(path, on_error='skip', check_media=check)
    assert len(w) == 1 and w[0].filename == __file__
    assert [(s.meta['id'], s.origin) for s in d] == [(0, f'{path}:1'), (1, f'{path}:3')]
    assert [str(p) for p in d.problems] == [said] and d.problems[0].origin == f'{path}:2'


@pytest.mark.parametrize('name', INSIDE)
def test_later_faults_have_an_address_too(shelf, name):
    "What headers don't show is found by the decoder, with the same line."
    row, says = INSIDE[name]
    s = to_sample(row, shelf, 'data.jsonl:7')
    with pytest.raises(RowError) as e: decode(s)
    assert str(e.value).startswith('data.jsonl:7 ') and says.replace('{}', str(shelf)) in str(e.value)


def test_many_faults_are_all_counted(shelf):
    rows = [json.dumps(GOOD[0]).encode()] + [c[1] for c in CASES if c[3] is True]
    path = shelf/'all.jsonl'
    path.write_bytes(b'\n'.join(rows))
    with warnings.catch_warnings(action='ignore'): d = read(path, on_error='skip')
    assert (len(d), len(d.problems)) == (1, len(rows) - 1)
    assert [p.origin for p in d.problems] == [f'{path}:{n}' for n in range(2, len(rows) + 1)]
    with pytest.raises(RowError, match='all.jsonl:2 '): read(path)      # the first, not the last


def test_a_broken_array_says_that_it_ends_there(shelf):
    path = shelf/'data.json'
    path.write_text(json.dumps(GOOD, indent=1)[:-3] + ', }\n]')
    with pytest.raises(RowError, match=r'data.json:\d+ row: not JSON .*nothing more can be read; expected an array of objects'): read(path)
    with pytest.warns(UserWarning): d = read(path, on_error='skip')
    assert (len(d), len(d.problems)) == (1, 1)


@pytest.mark.parametrize('make, says', [
    (None, 'No such file or directory; expected a file of rows'), ('folder', 'Is a directory'),
    (b'', 'no rows in it; expected at least one'), (b'\n \n', 'no rows in it')])
def test_no_data_set(tmp_path, make, says):
    path = tmp_path/'d.jsonl'
    if make == 'folder': path.mkdir()
    elif make is not None: path.write_bytes(make)
    for how in 'raise', 'skip':
        with pytest.raises(RowError, match=says) as e: read(path, on_error=how)
        assert str(e.value).startswith(str(path)) and '\n' not in str(e.value)


def test_options_are_checked(shelf):
    with pytest.raises(ValueError, match="on_error='ignore'; expected raise or skip"): read(shelf/'data.jsonl', on_error='ignore')
    with pytest.raises(ValueError, match="check_media='yes'; expected True, False or decode"): read(shelf/'data.jsonl', check_media='yes')


def test_prompts_only(tmp_path):
    (tmp_path/'p.jsonl').write_text(json.dumps(chat(U)))
    assert read(tmp_path/'p.jsonl', answer=False)[0].messages[0].text == 'Hi'


def test_a_wrong_ending_is_no_fault(shelf):
    "What counts is the content: a PNG called .jpg is read as what it is."
    (shelf/'really_png.jpg').write_bytes((shelf/'noise.png').read_bytes())
    assert np.array_equal(np.asarray(load_image(shelf/'really_png.jpg')), NOISE)


def test_headers_cost_nothing(shelf):
    "A bomb is refused without its pixels being made; the reader's peak memory says so."
    code = f'import resource; from omnilab.data.samples import load; from omnilab.data.media import MediaError\n' \
           f'base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n' \
           f'for name in ("bomb.png", "huge.png", "large.png"):\n' \
           f'    try: load(r"{shelf}/" + name, "image")\n' \
           f'    except MediaError: pass\n' \
           f'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert int(done.stdout) < 20_000, done.stderr      # kilobytes; decoded, the first alone would take 243,000


def test_settings_bound_media(shelf):
    code = f'from omnilab.data.media import load_image; load_image(r"{shelf}/cat.png")'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'OMNILAB_MEDIA_MAX_PIXELS': '799'})
    assert done.stderr.strip().endswith('cat.png: 800 pixels; expected at most 799 (settings: media.max_pixels)')


@pytest.mark.parametrize('name, load, limit, says', [
    ('film.mp4', load_video, {'frames': 5}, '6 frames; expected at most 5'), ('film.mp4', load_video, {'seconds': 1}, '1.5 seconds; expected at most 1'),
    ('film.mp4', load_video, {'pixels': 39_999}, '40,000 pixels; expected at most 39,999'),
    ('film.mp4', load_video, {'bytes': 719_999}, '720,000 bytes; expected at most'),
    ('film.mp4', load_audio, {'seconds': .5}, 'seconds; expected at most 0.5'), ('tone.flac', load_audio, {'seconds': .99}, '1 seconds; expected at most 0.99'),
    ('tone.flac', load_audio, {'bytes': 31_999}, '32,000 bytes; expected at most 31,999')])
def test_limits(shelf, name, load, limit, says):
    "Also what a small file becomes is bounded: six frames of noise are 720,000 bytes."
    with pytest.raises(MediaError, match=says): load(shelf/name, limits=Limits(**limit))
    load(shelf/name, limits=Limits(**{k: v * 2 for k, v in limit.items()}))


@pytest.mark.parametrize('at', range(5, 100, 10))
@pytest.mark.parametrize('name, load', [('noise.png', load_image), ('tone.flac', load_audio), ('tone.wav', load_audio), ('film.mp4', load_video)])
def test_cut_anywhere(shelf, name, load, at):
    "A file that ends too early is refused, wherever it ends."
    b = (shelf/name).read_bytes()
    with pytest.raises(MediaError) as e: load(b[:len(b) * at // 100])
    assert '; expected ' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('name, load', [('noise.png', load_image), ('noise.jpg', load_image), ('tone.flac', load_audio), ('tone.wav', load_audio),
                                        ('film.mp4', load_video)])
def test_damaged_anywhere(shelf, name, load, seed):
    "Noise in a file: it is refused in one line, or read (not every format can tell); no other error comes out."
    rng, b = np.random.default_rng(seed), bytearray((shelf/name).read_bytes())
    for i in rng.integers(0, [200, len(b)][seed % 2], 8): b[i] = rng.integers(256)
    try: load(bytes(b))
    except MediaError as e: assert '; expected ' in str(e) and '\n' not in str(e)


def test_urls_only_if_asked(shelf):
    "The network is reached when the settings say so, up to the limit, and a failure is one line."
    class Serve(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self):
            ok = self.path == '/cat.png'
            self.send_response(200 if ok else 404)
            self.end_headers()
            self.wfile.write((shelf/'cat.png').read_bytes() if ok else b'')
    server = HTTPServer(('127.0.0.1', 0), Serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    try:
        with pytest.raises(MediaError, match='a URL; expected a local file'): load_image(f'{url}/cat.png')
        assert load_image(f'{url}/cat.png', Limits(urls=True)).size == (40, 20)
        with pytest.raises(MediaError, match='bytes; expected at most 50'): load_image(f'{url}/cat.png', Limits(urls=True, bytes=50))
        with pytest.raises(MediaError, match='cannot be fetched .*404.*expected a URL that answers'): load_image(f'{url}/dog.png', Limits(urls=True))
        with pytest.raises(MediaError, match='a URL; expected a local file'): load_image('ftp://127.0.0.1/a.png', Limits(urls=True))
    finally: server.shutdown()


def test_base64_of_a_file(shelf):
    uri = 'data:image/png;base64,' + base64.b64encode((shelf/'cat.png').read_bytes()).decode()
    assert load_image(uri).size == (40, 20)
    with pytest.raises(MediaError, match='data URI of .* characters: .*bytes; expected at most 50'): load_image(uri, Limits(bytes=50))
