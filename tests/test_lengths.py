"""Rows by sizes are the encoder's rows, token for token, for every family: nothing is decoded, and where no header tells, it is said."""
import io
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec

import families as f
import numpy as np
import pytest
import torch

FAMILIES = '''qwen2_5_vl qwen3_vl qwen3_5 gemma3 gemma3n gemma4 llava_onevision internvl idefics3 janus minicpm_v qwen2_audio voxtral voxtral_parts
              qwen2_5_omni qwen3_omni llama4 phi4 ours'''.split()
NEEDS = {'gemma3n': 'timm', 'voxtral': 'mistral_common'}
COUNTS = {'qwen2_5_vl': {'image', 'video'}, 'qwen3_vl': {'image'}, 'qwen3_5': {'image'}, 'gemma4': {'image', 'audio'}, 'internvl': {'image'}}
OPTIONS = [('qwen2_5_vl', dict(image=dict(min_pixels=28 * 28, max_pixels=28 * 28 * 6))), ('qwen2_5_vl', dict(video=dict(num_frames=6))),
           ('qwen3_vl', dict(image=dict(max_pixels=32 * 32 * 40), video=dict(fps=1))), ('qwen3_omni', dict(image=dict(max_pixels=32 * 32 * 3))),
           ('internvl', dict(image=dict(max_patches=2))), ('gemma4', dict(image=dict(max_soft_tokens=140))), ('ours', dict(processor=dict(num_frames=2)))]


def family(name):
    import omnilab, transformers     # noqa: F401 (omnilab first: torchvision)
    if name in NEEDS and not find_spec(NEEDS[name]): pytest.skip(f'{NEEDS[name]} is not installed')
    if name == 'ours':
        from omnilab.models.load import load
        m = load('omni-tiny')
        return m.model, m.processor
    model, processor = getattr(f, name)(transformers)
    return f.alive(model), processor


def media():
    "Odd sizes, wide and tall; one of them twice."
    from omnilab.data.media import Audio, Video
    from omnilab.data.samples import Part
    from PIL import Image
    rng = np.random.default_rng(0)
    picture = lambda w, h: Part('image', Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)))
    sound = lambda n, rate: Part('audio', Audio(rng.uniform(-.5, .5, n), rate))
    clip = lambda t, h, w, fps: Part('video', Video(rng.integers(0, 255, (t, h, w, 3), np.uint8), fps))
    return {'image': [picture(*s) for s in ((64, 64), (37, 111), (200, 61), (320, 480), (64, 64))], 'video': [clip(4, 64, 64, 2.), clip(9, 48, 100, 4.)],
            'audio': [sound(8000, 16000), sound(12345, 16000), sound(1600, 22050), sound(16001, 8000)]}


def conversations(model):
    "Each medium alone and between texts, two of a kind, all kinds together, two turns, and text."
    from omnilab.data.samples import Message, Part, Sample
    from omnilab.models.load import capabilities
    say = lambda *parts: [p if isinstance(p, Part) else Part('text', p) for p in parts]
    by = {kind: some for kind, some in media().items() if kind in capabilities(model)['in']}
    asked = [say(p, 'what is this ?') for some in by.values() for p in some] + [say('look at', p, 'and this ?') for some in by.values() for p in some[:2]]
    asked += [say(*some[1:3], 'how many ?') for some in by.values()] + [say(*(some[1] for some in by.values()), 'what ?')] + [say('how many are there ?')]
    answers = [Message('assistant', 'two of them'), Message('user', 'and this ?'), Message('assistant', 'one')]
    return [Sample([Message('user', parts), *answers], origin=f'd:{i}') for i, parts in enumerate(asked)]


@contextmanager
def undecoded():
    "Whatever decodes a picture, a sound or a film fails."
    import av
    from PIL import ImageFile
    fail, real = lambda *a, **kw: pytest.fail('decoded'), av.open

    class Shut:
        def __init__(self, *a, **kw): self.c = real(*a, **kw)
        def __getattr__(self, name): return fail if name == 'decode' else getattr(self.c, name)
        def __enter__(self): return self
        def __exit__(self, *a): self.c.close()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(av, 'open', Shut); m.setattr(ImageFile.ImageFile, 'load', fail); m.setattr('omnilab.data.audio.read_sound', fail)
        yield


def compare(model, processor, samples=None):
    from omnilab.forest.encode import encode_all
    from omnilab.forest.lengths import lengths
    from omnilab.forest.tree import forest
    samples = samples or conversations(model)
    want, bad = encode_all(samples, processor, model, 'skip')
    with undecoded(): got = lengths(samples, processor, model, on_error='skip')
    assert len(got.rows) == len(want) and [p.origin for p in got.problems] == [p.origin for p in bad]
    for a, b in zip(got.rows, want):
        assert a.ids.equal(b.ids) and a.target.equal(b.target) and (a.media_keys, a.media_end) == (b.media_keys, b.media_end) and not a.media
    assert [len(t) for t in forest(got.rows)] == [len(t) for t in forest(want)]
    return got


@pytest.mark.parametrize('name', FAMILIES)
def test_every_family(name):
    got = compare(*family(name))
    assert not got.decoded and bool(got.said['arithmetic']) == (name in COUNTS)


@pytest.mark.parametrize('name, media', OPTIONS, ids=[f'{n} {m}' for n, m in OPTIONS])
def test_options(name, media):
    "What is set in a recipe's media: is in force here, too."
    from omnilab.models.options import configure
    model, processor = family(name)
    assert [len(r) for r in compare(model, configure(processor, **media)).rows] != [len(r) for r in compare(model, processor).rows]


@pytest.mark.parametrize('name', COUNTS)
def test_whose_arithmetic_is_right(name):
    from omnilab.forest.context import Encoder
    from omnilab.forest.lengths import PROBES, learn_frame
    model, processor = family(name)
    def right(kind):
        try: return learn_frame(Encoder(processor, model), kind)
        except ValueError: return None
    assert {kind for kind in PROBES if right(kind)} == COUNTS[name]


def ask(*media, answer='two'):
    from omnilab.data.samples import Message, Part, Sample
    answer = answer if isinstance(answer, str) else [Part(*p) for p in answer]
    return Sample([Message('user', [*(Part(*p) for p in media), Part('text', 'what ?')]), Message('assistant', answer)])


def film(form, video='mpeg4', turn=None, sound=None, n=12_345, rate=16_000, start=0, size=(96, 64)):
    "Bytes of a film as another program would write it."
    import av
    out, rng = io.BytesIO(), np.random.default_rng(0)
    with av.open(out, 'w', format=form) as c:
        s = c.add_stream(video, rate=4)
        s.width, s.height, s.pix_fmt, s.codec_context.thread_count = *size, 'yuvj420p' if video == 'mjpeg' else 'yuv420p', 1
        if turn is not None: s.set_display_rotation(turn)
        a = sound and c.add_stream(sound, rate=rate, layout='mono')
        frames = rng.integers(0, 255, (6, *size[::-1], 3), np.uint8)
        for f in [*(av.VideoFrame.from_ndarray(f, format='rgb24') for f in frames), None]: c.mux(s.encode(f))
        if a:
            wave = rng.uniform(-.5, .5, n).astype(np.float32)[None]
            if sound == 'flac': f = av.AudioFrame.from_ndarray((wave * 2**15).astype(np.int16), format='s16', layout='mono')
            else: f = av.AudioFrame.from_ndarray(wave, format='fltp', layout='mono')
            f.sample_rate, f.pts, f.time_base = rate, start, Fraction(1, rate)
            c.mux([*a.encode(f), *a.encode()])
    return out.getvalue()


def test_the_proof_would_fail(tmp_path):
    "Each kind of file, as the encoder reads it, is decoded."
    from omnilab.data.media import load_audio, load_image, load_video, save_audio, save_image
    by = media()
    save_image(by['image'][1].value, tmp_path/'a.png'); save_audio(by['audio'][1].value, tmp_path/'a.wav')
    for load, src in ((load_image, tmp_path/'a.png'), (load_audio, tmp_path/'a.wav'), (load_video, film('mp4')), (load_audio, film('mp4', sound='aac'))):
        load(src)
        with undecoded(), pytest.raises(pytest.fail.Exception): load(src)


@pytest.mark.parametrize('name', ['ours', 'qwen2_5_vl', 'qwen3_omni'])
def test_files_lying_and_upright(name, tmp_path):
    "Pictures and clips from files, turned by every note that a container can hold."
    from omnilab.data.media import save_image
    from PIL import Image
    model, processor = family(name)
    picture = media()['image'][1].value
    save_image(picture, tmp_path/'a.png')
    note = Image.Exif(); note[0x0112] = 6
    picture.save(tmp_path/'b.jpg', exif=note)
    forms = [('mp4', 'libx264'), ('mov', 'mjpeg'), ('matroska', 'mpeg4'), ('webm', 'libvpx')]
    films = [film(form, video, turn) for form, video in forms for turn in (None, 90, 180, 270)] + [film('avi', turn=90)]
    got = compare(model, processor, [ask(('image', str(tmp_path/n))) for n in ('a.png', 'b.jpg')] + [ask(('video', f)) for f in films])
    assert not got.decoded and (name == 'ours' or len({len(r) for r in got.rows}) > 1)


FILMS = [('mp4', 'aac'), ('mp4', 'libmp3lame'), ('mp4', 'libopus'), ('mov', 'pcm_s16le'), ('matroska', 'aac'), ('matroska', 'libopus'), ('matroska', 'ac3'),
         ('avi', 'libmp3lame'), ('avi', 'pcm_u8')]


@pytest.mark.parametrize('name', ['ours', 'qwen2_audio', 'gemma4', 'qwen2_5_omni', 'phi4'])
def test_sounds_of_films(name):
    "As long as their packets say, to the token: any coder, odd lengths and rates, beginning early or late."
    model, processor = family(name)
    ways = [(12_345, 48_000, 0), (16_011, 32_000, 700), (8001, 48_000, -333)]
    got = compare(model, processor, [ask(('audio', film(form, sound=coder, n=n, rate=48_000 if coder == 'libopus' else rate, start=start)))
                                     for form, coder in FILMS for n, rate, start in ways])
    assert not got.decoded and len({len(r) for r in got.rows}) > 1


@pytest.mark.parametrize('name', ['qwen2_5_omni', 'qwen3_omni'])
def test_clips_that_are_heard(name):
    from omnilab.models.options import configure
    model, processor = family(name)
    processor = configure(processor, video=dict(use_audio_in_video=True))
    films = [film(form, sound=coder, n=n, rate=48_000, turn=turn) for form, coder in FILMS[:5:2] for n, turn in ((48_001, 90), (80_123, None))]
    got = compare(model, processor, [ask(('video', f)) for f in [*films, film('mp4')]])
    assert not got.decoded and len(got.problems) == 1 and 'no sound in it; expected a clip with a sound track' in got.problems[0].message


def test_what_no_header_tells_is_encoded_and_said():
    from PIL import Image
    model, processor = family('qwen2_5_omni')
    import av
    note = Image.Exif(); note[0x0112] = 6
    Image.new('RGB', (96, 64)).save(jpeg := io.BytesIO(), 'JPEG', exif=note, subsampling=2)
    with av.open(out := io.BytesIO(), 'w', format='matroska') as c, av.open(io.BytesIO(film('matroska', 'mjpeg'))) as old:
        s = c.add_stream_from_template(old.streams.video[0])
        for p in old.demux(video=0):
            if not p.size: continue
            new = av.Packet(jpeg.getvalue()); new.pts, new.dts, new.time_base, new.stream = p.pts, p.dts, p.time_base, s
            c.mux(new)
    from omnilab.forest.encode import encode_all
    from omnilab.forest.lengths import lengths
    samples = [ask(('video', out.getvalue())), ask(('audio', film('matroska', sound='flac'))), ask(('audio', film('mp4', sound='aac')))] * 2
    got, want = lengths(samples, processor, model), encode_all(samples, processor, model)[0]
    assert got.decoded == Counter({'films whose frames may turn themselves': 2, 'sounds in flac': 2})
    assert all(a.ids.equal(b.ids) and a.target.equal(b.target) for a, b in zip(got.rows, want, strict=True))


def test_media_in_answers(tmp_path):
    "As many codes as the file's own; stand-ins tell two answers to one question apart, and know the same medium again."
    from omnilab.data.media import save_audio, save_image
    from omnilab.data.samples import Message, Part
    from omnilab.forest.encode import encode_all
    from omnilab.forest.lengths import lengths
    from omnilab.forest.tree import forest
    model, processor = family('ours')
    for i, p in enumerate(media()['image']): save_image(p.value, tmp_path/f'{i}.png')
    for i, p in enumerate(media()['audio']): save_audio(p.value, tmp_path/f'{i}.wav')
    image, sound = [('image', str(tmp_path/f'{i}.png')) for i in range(5)], [('audio', str(tmp_path/f'{i}.wav')) for i in range(4)]
    samples = [ask(answer=[m]) for m in [*image, *sound, ('audio', film('mp4', sound='aac', n=9001, rate=44_100))]]
    samples += [ask(image[0], answer=[image[1], ('text', 'and'), sound[2], image[0]]), ask(answer=[image[1]]), ask(image[2], answer=[sound[0]])]
    more = Message('user', 'again'), Message('assistant', [Part(*image[3])]), Message('user', 'and ?'), Message('assistant', 'no')
    samples = [replace(s, messages=[*s.messages, *more]) if i % 5 < 2 else s for i, s in enumerate(samples)]
    want = encode_all(samples, processor, model)[0]
    with undecoded(): got = lengths(samples, processor, model)
    codes = processor.token_kinds()[0] > 1
    for a, b in zip(got.rows, want, strict=True):
        made = a.ids < 0
        assert a.target.equal(b.target) and a.ids[~made].equal(b.ids[~made]) and codes[b.ids[made]].all() and made.any()
        assert (a.media_keys, a.media_end) == (b.media_keys, b.media_end)
    twins = lambda rows: {(i, j) for i, a in enumerate(rows) for j, b in enumerate(rows) if i < j and a.ids.equal(b.ids)}
    assert not got.decoded and twins(got.rows) and twins(got.rows) <= twins(want)                  # two pictures of noise may have the same codes
    assert sum(map(len, forest(got.rows))) >= sum(map(len, forest(want)))


def test_codes_as_many_as_content_asks_are_encoded_and_said(monkeypatch):
    from omnilab.forest.encode import encode_all
    from omnilab.forest.lengths import lengths
    import omnilab.models.processor as module
    model, processor = family('ours')
    real, loud = module.spell, lambda item: np.abs(getattr(item, 'wave', item)).max() > .1
    monkeypatch.setattr(module, 'spell', lambda p, kind, item: real(p, kind, item) + '<|audio_0|>' * int(loud(item)))
    samples = [ask(answer=[('audio', p.value)]) for p in media()['audio'][:2]]
    got = lengths(samples, processor, model)
    assert got.decoded == Counter({'media in answers whose length follows from their content': 2})
    assert all(a.ids.equal(b.ids) for a, b in zip(got.rows, encode_all(samples, processor, model)[0], strict=True))


@pytest.mark.parametrize('name', ['qwen2_audio', 'qwen2_5_omni'])
def test_a_sound_that_is_too_long_is_refused_here_too(name):
    from omnilab.data.media import Audio
    from omnilab.data.samples import Message, Part, Sample
    from omnilab.forest.lengths import lengths
    from omnilab.forest.template import EncodeError
    long = Sample([Message('user', [Part('audio', Audio(np.ones(40_000) / 3, 16_000)), Part('text', 'what ?')]), Message('assistant', 'two')], origin='a:1')
    model, processor = family(name)
    with pytest.raises(EncodeError, match=r'a:1 messages\[1\]: a sound of 2.5 s, whose end .* leaves out'): lengths([long], processor, model)


def test_where_places_matter_the_processor_is_asked():
    "Rotary frequencies that follow a row's length: positions are kept, and no arithmetic is used."
    from omnilab.forest.encode import encode_all
    from omnilab.forest.lengths import lengths
    model, processor = family('qwen2_5_vl')
    model.config.get_text_config().rope_parameters['rope_type'] = 'dynamic'
    samples = conversations(model)
    got, want = lengths(samples, processor, model), encode_all(samples, processor, model)[0]
    assert not got.said['arithmetic']
    assert all(a.positions is b.positions is None or torch.equal(a.positions, b.positions) for a, b in zip(got.rows, want))
