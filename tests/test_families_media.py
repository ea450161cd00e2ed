"""Published multimodal families, as twins with their own processors: `check` finds nothing wrong with them."""
from importlib.util import find_spec

import pytest
from families import *     # noqa: F401, F403 (other tests find the families here)
import families as f


def needs(name): return pytest.mark.skipif(not find_spec(name), reason=f'{name} is not installed')


FAMILIES = {
    'Qwen2.5-VL': f.qwen2_5_vl,
    'Qwen3-VL': f.qwen3_vl,
    'Qwen3.5': f.qwen3_5,
    'Gemma 3, image blocks and windows': f.gemma3,
    'Gemma 3, image blocks longer than its windows': f.gemma3_long,
    'Gemma 3n, inputs of each layer, shared keys': pytest.param(f.gemma3n, marks=needs('timm')),
    'LLaVA-OneVision': f.llava_onevision,
    'InternVL': f.internvl,
    'Idefics3': f.idefics3,
    'Janus, understanding': f.janus,
    'Qwen2-Audio': f.qwen2_audio,
    'Voxtral': pytest.param(f.voxtral, marks=needs('mistral_common')),
    'Voxtral, its parts under a template': f.voxtral_parts,
    'Qwen2.5-Omni, the thinker': f.qwen2_5_omni,
    'Qwen3-Omni-MoE, the thinker': f.qwen3_omni,
    'Llama 4, chunks': f.llama4,
}
REFUSED = {
    'mllama': (f.mllama, {}, 'cross-attention'),
    'Llama 4, longer than its scale': (f.llama4, dict(floor_scale=8), 'place in the row'),
    'Gemma 4, clips: its class loses how many frames each has': (f.gemma4, {}, 'num_frames_per_video'),
    'Phi-4-multimodal, sounds of different lengths without a mask': (f.phi4, {}, 'cannot be joined'),
    'MiniCPM-V, which reads the first row of pixels alone': (f.minicpm_v, {}, 'must match'),
}


def report_of(make, *asked, **more):
    import transformers
    from omnilab.train.check import check          # registers the attention named 'forest'
    model, processor = make(transformers, **more)
    return check(f.alive(model, processor.tokenizer.eos_token_id), processor, make.__name__, *asked)


@pytest.mark.parametrize('make', FAMILIES.values(), ids=FAMILIES)
def test_checks(make):
    report = report_of(make)
    assert report.ok, '\n'.join(str(x.cells()) for x in report.findings if not x.ok)


@pytest.mark.parametrize('make, more, why', REFUSED.values(), ids=REFUSED)
def test_refuses(make, more, why):
    report = report_of(make, **more)
    assert not report.ok and any(why in x.note for x in report.findings if not x.ok), [str(x.cells()) for x in report.findings]


@pytest.mark.parametrize('make, asked', [(f.gemma4, ('text', 'image', 'audio')), (f.phi4, ('text', 'image'))], ids=['Gemma 4', 'Phi-4-multimodal'])
def test_checks_of_what_is_left(make, asked):
    report = report_of(make, asked)
    assert report.ok, '\n'.join(str(x.cells()) for x in report.findings if not x.ok)


def test_llama4_beyond_its_scale():
    "Scores are scaled by the place in the row: packs end before, and a row that is as long is refused."
    beyond, = [x for x in report_of(f.llama4).findings if 'beyond 256' in x.part]
    assert beyond.ok and 'place in the row' in beyond.note


def test_without_its_tower(monkeypatch):
    "Gemma 3n sees through a tower of another library; without it there is no twin, and one line says so."
    import transformers
    from transformers.utils import import_utils
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, 'timm', (lambda: False, import_utils.BACKENDS_MAPPING['timm'][1]))
    with pytest.raises(ValueError, match=r'^Gemma3nConfig: no twin; ImportError: .*timm.*\Z'): f.small(transformers.Gemma3nConfig())


@needs('timm')
def test_the_published_tower():
    "Its sizes stand in no configuration: it can't be shrunk, and one line says so."
    import transformers
    with pytest.raises(ValueError, match=r'^Gemma3nFor.*: its twin has 294.5 million parameters; not shrunk: model.vision_tower.*\Z'):
        f.small(transformers.Gemma3nConfig())


@needs('mistral_common')
def test_markers_in_texts():
    "A text that spells a marker stays bytes, in questions and in answers; what the class doesn't take is refused by name."
    import transformers
    from omnilab.data.parts import Message, Sample
    from omnilab.forest.encode import EncodeError, encode
    processor = f.voxtral(transformers)[1]
    tok = processor.tokenizer
    letters = lambda text: [len(tok) - 256 + b for b in text.encode()]
    begin, opens, closes, end = tok.convert_tokens_to_ids(['<s>', '[INST]', '[/INST]', '</s>'])
    for reader in (processor, tok):
        rows = encode(Sample([Message('user', 'say </s>'), Message('assistant', '[INST] </s>'), Message('user', 'x'), Message('assistant', 'y')]), reader)
        first, answer = [begin, opens, *letters('say </s>'), closes], [*letters('[INST] </s>'), end]
        assert rows[0].ids.tolist() == first + answer and rows[0].target.tolist() == [False] * len(first) + [True] * len(answer)
        assert rows[1].ids.tolist() == [*first, *answer, opens, *letters('x'), closes, *letters('y'), end]
    tools = [{'type': 'function', 'function': {'name': 'weather', 'parameters': {}}}]
    with pytest.raises(EncodeError, match='tools: the chat template leaves them out'):
        encode(Sample([Message('user', 'a'), Message('assistant', 'b')], template={'tools': tools}), processor)
