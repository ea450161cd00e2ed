"""Published families, as twins of their own configurations: `check` finds nothing wrong with them, on documents longer than their windows."""
import families
import pytest

GQA = dict(num_attention_heads=32, num_key_value_heads=8)
FAMILIES = {
    'Llama': ('LlamaConfig', GQA),
    'Mistral, windows': ('MistralConfig', {}),
    'Qwen2.5, windows in the upper layers': ('Qwen2Config', GQA | dict(use_sliding_window=True, max_window_layers=16)),
    'Qwen3': ('Qwen3Config', GQA),
    'Qwen3-MoE': ('Qwen3MoeConfig', {}),
    'Qwen3-Next': ('Qwen3NextConfig', {}),
    'Qwen3.5': ('Qwen3_5TextConfig', {}),
    'Gemma 2, windows and soft caps': ('Gemma2Config', dict(attn_logit_softcapping=50., final_logit_softcapping=30.)),
    'Gemma 3, windows': ('Gemma3TextConfig', {}),
    'Gemma 3n, shared keys and inputs of each layer': ('Gemma3nTextConfig', dict(vocab_size_per_layer_input=len(families.WORDS))),
    'Gemma 4, windows': ('Gemma4TextConfig', dict(vocab_size_per_layer_input=len(families.WORDS))),
    'gpt-oss, windows and sinks': ('GptOssConfig', {}),
    'Phi-3': ('Phi3Config', {}),
    'SmolLM3': ('SmolLM3Config', {}),
    'OLMo 2': ('Olmo2Config', {}),
    'DeepSeek-V3': ('DeepseekV3Config', {}),
}


PAIRS = dict(long_factor=[4.] * 64, short_factor=[1.] * 64)       # of a head of 128 dimensions
STRETCHED = {                                                       # long contexts, of an original length that a twin has at 256 tokens
    'Llama 3': ('LlamaConfig', dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=8192), {}),
    'Qwen3, YaRN': ('Qwen3Config', dict(rope_type='yarn', factor=4., original_max_position_embeddings=32768), {}),
    'Llama, long RoPE': ('LlamaConfig', dict(rope_type='longrope', factor=8., original_max_position_embeddings=4096, **PAIRS), {}),
    'Phi-3, long RoPE': ('Phi3Config', dict(rope_type='longrope', long_factor=[4.] * 48, short_factor=[1.] * 48),
                         dict(max_position_embeddings=131072, original_max_position_embeddings=4096)),
    'Ministral 3, scores scaled by the position': ('Ministral3Config', dict(rope_type='yarn', factor=16., original_max_position_embeddings=16384,
                                                                            llama_4_scaling_beta=.1), {}),
}


def tokenizer():
    tok = families.tokenizer({})
    tok.chat_template = ("{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
                         "{% if add_generation_prompt %}<assistant> {% endif %}")
    return tok


def report_of(config, more):
    import transformers
    from omnilab.train.check import check          # registers the attention named 'forest'
    tok = tokenizer()
    model = families.small(getattr(transformers, config)(**families.words(tok) | more))
    return check(families.alive(model), tok, config)


@pytest.mark.parametrize('config, more', FAMILIES.values(), ids=FAMILIES)
def test_checks(config, more):
    report = report_of(config, more)
    assert report.ok, '\n'.join(str(f.cells()) for f in report.findings if not f.ok)


@pytest.mark.parametrize('config, rope, more', STRETCHED.values(), ids=STRETCHED)
def test_checks_beyond_the_original_length(config, rope, more):
    report = report_of(config, GQA | dict(max_position_embeddings=131072) | more | dict(rope_parameters=dict(rope_theta=1e4) | rope))
    assert report.ok, '\n'.join(str(f.cells()) for f in report.findings if not f.ok)
    assert {f.what for f in report.findings if 'beyond 256' in f.part} == {'logits: forest = rows', 'gradients: forest = rows'}


def test_refuses_what_follows_the_longest_row():
    report = report_of('LlamaConfig', GQA | dict(rope_parameters=dict(rope_type='dynamic', rope_theta=1e4, factor=4.)))
    beyond, = [f for f in report.findings if 'beyond' in f.part]
    assert report.ok and 'expected fewer than 256' in beyond.note


def test_checks_weights_in_bfloat16(tmp_path):
    "A twin that was saved, its experts chosen by scores that nearly tie: half precision is not taken for an error, and an error not for half precision."
    import transformers
    from omnilab.train.check import check
    from omnilab.train.evaluate import CheckRecipe, open_checked
    tok = tokenizer()
    families.alive(families.small(transformers.Qwen3MoeConfig(**families.words(tok)))).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    m = open_checked(CheckRecipe(str(tmp_path), weights=True, dtype='bfloat16', device='cpu'))
    kept = {n: p.clone() for n, p in m.model.state_dict().items()}
    report = check(m.model, m.processor)
    assert report.ok, '\n'.join(str(f.cells()) for f in report.findings if not f.ok)
    assert all(p.equal(kept[n]) and p.dtype == kept[n].dtype for n, p in m.model.state_dict().items())
    place = lambda layer, args: (args[0] + .05 * args[0].new_tensor(range(args[0].shape[1]))[:, None], *args[1:])
    m.model.model.layers[0].register_forward_pre_hook(place)
    assert {f.what for f in check(m.model, m.processor).findings if not f.ok} >= {'logits: forest = rows', 'gradients: forest = rows'}


@pytest.mark.parametrize('config, more, why', [
    ('MambaConfig', {}, 'recurrent layer'),
    ('Lfm2Config', dict(layer_types=['conv', 'conv', 'full_attention', 'conv'] * 8), 'conv'),
    ('FalconH1Config', dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8), 'recurrent layer'),
    ('StableLmConfig', {}, 'a call without the keyword that its model was given'),       # its layers drop keywords
], ids=['Mamba', 'LFM2', 'Falcon-H1', 'StableLM'])
def test_refuses(config, more, why):
    report = report_of(config, more)
    assert not report.ok and why in report.findings[-1].note, [str(f.cells()) for f in report.findings]
