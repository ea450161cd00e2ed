"""Published families' own processors: documents are learned whole, and no sound is cut silently."""
import families as f
import numpy as np
import pytest
from PIL import Image

FAMILIES = {'Qwen2.5-VL': (f.qwen2_5_vl, 'image'), 'Qwen3-VL': (f.qwen3_vl, 'image'),
            'Gemma 3': (f.gemma3, 'image'), 'LLaVA-OneVision': (f.llava_onevision, 'image'),
            'InternVL': (f.internvl, 'image'),
            'Idefics3': (f.idefics3, 'image'), 'Qwen2-Audio': (f.qwen2_audio, 'audio'), 'Qwen2.5-Omni': (f.qwen2_5_omni, 'audio')}
CUT = {'Qwen2-Audio': f.qwen2_audio, 'Voxtral': f.voxtral_parts, 'Qwen2.5-Omni': f.qwen2_5_omni}
WHOLE = {'Qwen3-Omni': f.qwen3_omni, 'Phi-4': f.phi4, 'Gemma 4': f.gemma4}


def encoder(make):
    import transformers
    from omnilab.forest.context import Encoder
    model, processor = make(transformers)
    return Encoder(processor, f.alive(model))


def sound(seconds):
    from omnilab.data.media import Audio
    return Audio(.3 * np.sin(np.arange(round(16000 * seconds)) / 5).astype(np.float32), 16000)


def question(seconds):
    from omnilab.data.samples import Message, Part, Sample
    return Sample([Message('user', [Part('audio', sound(seconds)), Part('text', 'what is this ?')]), Message('assistant', 'two')], origin='a.jsonl:1')


@pytest.mark.parametrize('make, kind', FAMILIES.values(), ids=FAMILIES)
def test_documents(make, kind):
    "All that is said is trained, what stands for the medium isn't; its tensors are those of a question, and the model can be asked."
    import torch
    from omnilab.data.samples import Message, Part, Sample
    from omnilab.forest.encode import encode
    enc, medium = encoder(make), Part(kind, Image.new('RGB', (32, 32), 'red') if kind == 'image' else sound(.5))
    row, = encode(Sample([Message('document', [Part('text', 'look at this '), medium, Part('text', ' and say two')])]), enc)
    said = [enc.tokenizer.decode([t]).strip() for t in row.ids[row.target].tolist()]
    assert [w for w in said if w in f.WORDS] == 'at this and say two <end>'.split()
    assert not set(row.ids[row.target].tolist()) & enc.placeholders.keys() and set(row.ids[1:][~row.target[1:]].tolist()) <= enc.placeholders.keys()
    asked, = encode(Sample([Message('user', [medium, Part('text', 'what ?')]), Message('assistant', 'two')]), enc)
    assert row.media.keys() == asked.media.keys() and all(torch.equal(v, asked.media[k]) for k, v in row.media.items())
    assert row.media_end == 1 + max(i for i, t in enumerate(row.ids.tolist()) if t in enc.placeholders)


@pytest.mark.parametrize('make', CUT.values(), ids=CUT)
def test_a_sound_longer_than_the_window_is_refused(make):
    "These extractors have a window of 2 seconds here (30 as published) and cut without a word."
    from omnilab.forest.encode import encode
    from omnilab.forest.template import EncodeError
    enc = encoder(make)
    assert len(encode(question(2), enc)) == 1
    line = r'a.jsonl:1 messages\[1\]: a sound of 2.5 s, whose end .* leaves out \(its window is 2 s\); expected one that is heard whole'
    with pytest.raises(EncodeError, match=line): encode(question(2.5), enc)
    assert len(encode(question(1.5), enc)) == 1


@pytest.mark.parametrize('make', WHOLE.values(), ids=WHOLE)
def test_longer_sounds_are_longer_rows(make):
    "These hear any length: a window is not guessed from attributes."
    from omnilab.forest.encode import encode
    short, long = (len(encode(question(s), encoder(make))[0]) for s in (1.5, 2.5))
    assert long > short
