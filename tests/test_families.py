"""Published families, as tiny random models of the very same classes: `check` finds nothing wrong with them, on documents longer than their windows."""
import pytest

WORDS = '<pad> <end> <user> <assistant> <unk> how many are there ? what is this here two one of them look at the following and say :'.split()
SIZES = dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=.3, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None)
HEADS, WINDOW, CAPS = dict(head_dim=8), dict(sliding_window=11), dict(attn_logit_softcapping=5., final_logit_softcapping=10.)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
FAMILIES = {
    'Llama': ('LlamaForCausalLM', 'LlamaConfig', HEADS),
    'Mistral, windows': ('MistralForCausalLM', 'MistralConfig', HEADS | WINDOW),
    'Qwen2.5, windows in the upper layers': ('Qwen2ForCausalLM', 'Qwen2Config', WINDOW | dict(use_sliding_window=True, max_window_layers=2)),
    'Qwen3': ('Qwen3ForCausalLM', 'Qwen3Config', HEADS),
    'Qwen3-MoE': ('Qwen3MoeForCausalLM', 'Qwen3MoeConfig', HEADS | EXPERTS),
    'Qwen3-Next': ('Qwen3NextForCausalLM', 'Qwen3NextConfig', HEADS | EXPERTS | DELTA | dict(shared_expert_intermediate_size=16)),
    'Qwen3.5': ('Qwen3_5ForCausalLM', 'Qwen3_5TextConfig', HEADS | DELTA),
    'Gemma 2, windows and soft caps': ('Gemma2ForCausalLM', 'Gemma2Config', HEADS | WINDOW | CAPS | dict(query_pre_attn_scalar=8)),
    'Gemma 3, windows': ('Gemma3ForCausalLM', 'Gemma3TextConfig', HEADS | WINDOW | dict(query_pre_attn_scalar=8, sliding_window_pattern=2)),
    'gpt-oss, windows and sinks': ('GptOssForCausalLM', 'GptOssConfig', HEADS | WINDOW | dict(num_local_experts=4, num_experts_per_tok=2)),
    'Phi-3': ('Phi3ForCausalLM', 'Phi3Config', {}),
    'SmolLM3': ('SmolLM3ForCausalLM', 'SmolLM3Config', {}),
    'OLMo 2': ('Olmo2ForCausalLM', 'Olmo2Config', {}),
}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='<end>', unk_token='<unk>')
    tok.chat_template = ("{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
                         "{% if add_generation_prompt %}<assistant> {% endif %}")
    return tok


def build(cls, config, more):
    import omnilab, torch, transformers     # noqa: F401, E401 (omnilab first)
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**SIZES | more)).eval()


@pytest.mark.parametrize('family', FAMILIES)
def test_checks(family):
    from omnilab.train.check import check          # registers the attention named 'forest'
    model = build(*FAMILIES[family])
    model.set_attn_implementation('forest')
    report = check(model, tokenizer(), family)
    assert report.ok, '\n'.join(str(f.cells()) for f in report.findings if not f.ok)


@pytest.mark.parametrize('cls, config, more, why', [
    ('MambaForCausalLM', 'MambaConfig', dict(state_size=4), 'recurrent layer'),
    ('Lfm2ForCausalLM', 'Lfm2Config', dict(layer_types=['conv', 'full_attention'] * 2), 'conv'),
    ('FalconH1ForCausalLM', 'FalconH1Config', dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8), 'recurrent layer'),
], ids=['Mamba', 'LFM2', 'Falcon-H1'])
def test_refuses(cls, config, more, why):
    from omnilab.train.check import check
    model = build(cls, config, more)
    report = check(model, tokenizer())
    assert not report.ok and why in report.findings[-1].note, [str(f.cells()) for f in report.findings]
