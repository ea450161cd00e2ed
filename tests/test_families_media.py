"""Published multimodal families, as tiny random models of the very same classes with their own processors: `check` finds nothing wrong with them."""
import pytest
from families import (alive, gemma3, gemma3_long, idefics3, internvl, janus, llama4, llava_onevision, mllama, qwen2_5_omni, qwen2_5_vl, qwen2_audio, qwen3_5,
                      qwen3_omni, qwen3_vl)

FAMILIES = {
    'Qwen2.5-VL': (qwen2_5_vl, ''),
    'Qwen3-VL': (qwen3_vl, ''),
    'Gemma 3, image blocks and windows': (gemma3, ''),
    'Gemma 3, image blocks longer than its windows': (gemma3_long, ''),
    'LLaVA-OneVision': (llava_onevision, ''),
    'InternVL': (internvl, ''),
    'Idefics3': (idefics3, ''),
    'Qwen2-Audio': (qwen2_audio, ''),
    'Qwen2.5-Omni, the thinker': (qwen2_5_omni, ''),
    'Qwen3-Omni-MoE, the thinker': (qwen3_omni, ''),
    'Janus, understanding': (janus, 'its class gives images but its processor writes none; its generate drops the logits processor'),
    'Qwen3.5': (qwen3_5, ''),
    'Llama 4, chunks': (llama4, ''),
}
REFUSED = {
    'mllama': (mllama, {}, 'cross-attention', ''),
    'Llama 4, longer than its scale': (llama4, dict(floor_scale=8), 'place in the row', ''),
}


def cases(table):
    """What is known to fail must fail: a fix takes its mark away."""
    return [pytest.param(*row, id=name, marks=[pytest.mark.xfail(strict=True, reason=why)] if why else []) for name, (*row, why) in table.items()]


def report_of(make, **more):
    from omnilab.train.check import check          # registers the attention named 'forest'
    import torch, transformers                     # noqa: E401
    torch.manual_seed(0)
    model, processor = make(transformers, **more)
    return check(alive(model), processor, make.__name__)


@pytest.mark.parametrize('make', cases(FAMILIES))
def test_checks(make):
    report = report_of(make)
    assert report.ok, '\n'.join(str(f.cells()) for f in report.findings if not f.ok)


@pytest.mark.parametrize('make, more, why', cases(REFUSED))
def test_refuses(make, more, why):
    report = report_of(make, **more)
    assert not report.ok and any(why in f.note for f in report.findings if not f.ok), [str(f.cells()) for f in report.findings]
