"""Rows by sizes are the encoder's rows, token for token, for every family: nothing is decoded, and where no header tells, it is said."""
from collections import Counter
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


def compare(model, processor):
    from omnilab.forest.encode import encode_all
    from omnilab.forest.lengths import lengths
    from omnilab.forest.tree import forest
    samples = conversations(model)
    (want, bad), got = encode_all(samples, processor, model, 'skip'), lengths(samples, processor, model, on_error='skip')
    assert len(got.rows) == len(want) > len(samples) and [p.origin for p in got.problems] == [p.origin for p in bad]
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


def test_nothing_is_decoded(tmp_path, monkeypatch):
    "Not a picture, not a sound; of a clip the first frame."
    from omnilab.forest.encode import encode_all
    import omnilab.forest.context as context
    from omnilab.data.media import save_audio, save_image, save_video
    from omnilab.data.samples import Message, Part, Sample
    from omnilab.forest.lengths import lengths
    model, processor = family('ours')
    files = [tmp_path/n for n in ('a.png', 'a.wav', 'a.mp4')]
    by = media()
    save_image(by['image'][1].value, files[0]); save_audio(by['audio'][1].value, files[1]); save_video(by['video'][1].value, files[2])
    said = [Part('text', 'what ?')], [Message('assistant', 'two')]
    samples = [Sample([Message('user', [Part(kind, str(p)), *said[0]]), *said[1]]) for kind, p in zip(('image', 'audio', 'video'), files)]
    for name in ('load_image', 'load_audio', 'load_video'): monkeypatch.setattr(context, name, lambda *a, **kw: pytest.fail('decoded'))
    with pytest.raises(pytest.fail.Exception): encode_all(samples, processor, model)
    assert len(lengths(samples, processor, model).rows) == 3


def test_sounds_of_films_are_encoded_and_said(tmp_path):
    from omnilab.data.media import Audio, Video, save_video
    from omnilab.data.samples import Message, Part, Sample
    from omnilab.forest.encode import encode_all
    from omnilab.forest.lengths import lengths
    model, processor = family('qwen2_audio')
    save_video(Video(np.zeros((4, 32, 32, 3), np.uint8), 4., Audio(np.zeros(8000), 8000)), tmp_path/'a.mp4')
    samples = [Sample([Message('user', [Part('audio', str(tmp_path/'a.mp4')), Part('text', 'what ?')]), Message('assistant', 'two')])] * 2
    got = lengths(samples, processor, model)
    assert got.decoded == Counter({'sounds in films': 2}) and all(a.ids.equal(b.ids) for a, b in zip(got.rows, encode_all(samples, processor, model)[0]))


def test_media_in_answers_are_encoded_and_said():
    "Their codes tell two answers to one question apart."
    from omnilab.data.samples import Message, Sample
    from omnilab.forest.lengths import lengths
    model, processor = family('ours')
    got = lengths([Sample([Message('user', 'draw'), Message('assistant', [p])]) for p in media()['image'][:2]], processor, model)
    assert got.decoded == Counter({'media in answers': 2}) and len({tuple(r.ids.tolist()) for r in got.rows}) == 2


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
