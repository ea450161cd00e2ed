"""Published chat templates: what is trained is what generation is given and what the finished conversation shows behind it.

TRL's wheel carries them as files. They are read from the installed package and never copied.
"""
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import omnilab.compat   # noqa: F401 (before transformers)
from omnilab.data.samples import to_sample
from omnilab.forest.encode import EncodeError, encode
from omnilab.forest.tree import forest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

TEMPLATES = {p.stem: p.read_text() for p in sorted((Path(find_spec('trl').origin).parent/'chat_templates').glob('*.jinja'))}
PUBLISHED = [n for n in TEMPLATES if not n.endswith('_training')]        # the others are TRL's own versions of them


# --- a tokenizer for each template: bytes, and every marker that the template writes

STOPS = {   # at which the family's generation configuration ends an answer; the first is the tokenizer's end of sequence
    'cohere': ['<|END_OF_TURN_TOKEN|>'], 'deepseek': ['<｜end▁of▁sentence｜>'], 'diffusion_gemma': ['<turn|>', '<|tool_response>'],
    'gemma4': ['<turn|>', '<|tool_response>'], 'gemma': ['<end_of_turn>'], 'glm4moe': ['<|endoftext|>', '<|user|>', '<|observation|>'],
    'gptoss': ['<|return|>', '<|call|>'], 'idefics3': ['<end_of_utterance>'], 'smolvlm': ['<end_of_utterance>'], 'llama3': ['<|eot_id|>', '<|eom_id|>'],
    'lfm2': ['<|im_end|>'], 'llava_next': ['</s>'], 'muse_glimmer': ['<|eot|>'], 'nemotron': ['<|im_end|>'], 'phi3': ['<|endoftext|>', '<|end|>'],
    'qwen': ['<|im_end|>', '<|endoftext|>']}
LISTS = 'idefics3', 'llava_next', 'smolvlm', 'qwen2_5_vl', 'qwen3_vl', 'lfm2_2_5_vl', 'gemma3', 'diffusion_gemma', 'gemma4'     # content is a list of parts


def of(table, name): return next((table[k] for k in sorted(table, key=len, reverse=True) if name.startswith(k)), None)


class TextProcessor(ProcessorMixin):
    "A processor without media."
    def __init__(self, tokenizer=None, chat_template=None, **kwargs): super().__init__(tokenizer, chat_template=chat_template)


def made(name):
    "Tokenizer or processor of a template, and a stand-in for its model, which knows where generation stops."
    stops = of(STOPS, name)
    marks = dict.fromkeys([*stops, '<|bos|>', '<|pad|>', *re.findall(r'''<[^<>\s'"{}]{1,40}>''', TEMPLATES[name])])
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    t.add_special_tokens([m for m in marks if '|' in m or '｜' in m or m in stops])
    t.add_tokens([m for m in marks if not ('|' in m or '｜' in m or m in stops)])
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token=stops[0], bos_token='<|bos|>', pad_token='<|pad|>', chat_template=TEMPLATES[name])
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=tok.convert_tokens_to_ids(stops)), config=SimpleNamespace())
    return (TextProcessor(tok, TEMPLATES[name]) if name.startswith(LISTS) else tok), tok, model


# --- conversations, as rows of a data set

def user(text): return {'role': 'user', 'content': text}
def answer(text, **more): return {'role': 'assistant', 'content': text, **more}


CALL = {'type': 'function', 'id': 'call00001', 'function': {'name': 'weather', 'arguments': {'city': 'Rome'}}}
TOOL = {'type': 'function', 'function': {'name': 'weather', 'description': 'of a city', 'parameters': {
    'type': 'object', 'properties': {'city': {'type': 'string', 'description': 'where'}}, 'required': ['city']}}}
AGENT = [user('Rain?'), answer('', tool_calls=[CALL]), {'role': 'tool', 'name': 'weather', 'tool_call_id': 'call00001', 'content': 'dry'}, answer('It is dry.')]
TALK = [user('Hi'), answer('Hello'), user('How many?'), answer('Two.'), user('Bye'), answer('Ciao')]
THOUGHT = [user('Hi'), answer('Hello', reasoning_content='be polite'), user('2 + 2?'), answer('4', reasoning_content='easy')]
ROWS = {    # messages, what the template is told, which turns are trained: the option and the messages
    'one': (TALK[:2], {}, 'all', [1]),
    'all': (TALK, {}, 'all', [1, 3, 5]),
    'last': (TALK, {}, 'last', [5]),
    'loss': ([{**m, 'loss': i == 3} if i in (1, 3) else m for i, m in enumerate(TALK)], {}, 'last', [3, 5]),
    'system': ([{'role': 'system', 'content': 'Be kind.'}, *TALK[:4]], {}, 'all', [2, 4]),
    'tools': (AGENT, {'tools': [TOOL]}, 'all', [1, 3]),
    'result': ([*TALK[:2], *AGENT], {}, 'last', [3, 5]),
    'given': ([{**m, 'loss': False} if 'tool_calls' in m else m for m in AGENT], {}, 'all', [3]),
    'thought': (THOUGHT, {}, 'all', [1, 3]),
    'inline': ([user('Hi'), answer('<think>\nbe polite\n</think>\n\nHello')], {}, 'all', [1]),
    'on': (THOUGHT, {'enable_thinking': True}, 'all', [1, 3]),
    'off': (TALK[:4], {'enable_thinking': False}, 'all', [1, 3]),
}


def row(name):
    "The row in one of the dialects of data sets."
    messages, told, which, _ = ROWS[name]
    switches = {k: v for k, v in told.items() if k != 'tools'}
    return {'messages': messages, **({'tools': told['tools']} if 'tools' in told else {}), **({'chat_template_kwargs': switches} if switches else {})}, which


# --- the reference: transformers' own rendering, and string surgery

WORD = {'gptoss': 'thinking', 'lfm2_2_5': 'thinking'}                       # the template's word for reasoning_content
OPENS = {('glm4moe', True): '<|observation|>', ('glm4moe', False): '<|user|>'}     # an answer that ends where the next message begins, after a call or not


def spoken(name, messages):
    "Messages as the template documents them."
    def one(m):
        m = {k: v for k, v in m.items() if k != 'loss'}
        if 'reasoning_content' in m: m[of(WORD, name) or 'reasoning_content'] = m.pop('reasoning_content')
        if name == 'deepseekv3' and 'tool_calls' in m:
            m['tool_calls'] = [{**c, 'function': {**c['function'], 'arguments': '{"city": "Rome"}'}} for c in m['tool_calls']]
        if name.startswith(LISTS): m['content'] = [{'type': 'text', 'text': m['content']}] if m['content'] else []
        return m
    return [one(m) for m in messages]


def expected(name, processor, tok, messages, told, k):
    "Token ids of prompt and answer."
    chat = spoken(name, messages)
    prompt = processor.apply_chat_template(chat[:k], add_generation_prompt=True, tokenize=True, return_dict=True, **told)['input_ids']
    text, whole = (processor.apply_chat_template(chat[:n], add_generation_prompt=p, tokenize=False, **told) for n, p in ((k, True), (k + 1, False)))
    assert whole.startswith(text)
    rest = whole[len(text):]
    ends = [i + len(s) for s in of(STOPS, name) if (i := rest.find(s)) >= 0]
    said = rest[:min(ends)] if ends else rest + OPENS[name.removesuffix('_training'), 'tool_calls' in messages[k]]
    assert not re.sub('|'.join(map(re.escape, of(STOPS, name))), '', rest[len(said):]).strip()
    return prompt[0] if isinstance(prompt[0], list) else prompt, tok(said, add_special_tokens=False).input_ids


# --- what is refused, and why

REASONS = {'thoughts': "leaves out 'be polite' of the reasoning_content", 'tools': 'tools: the chat template leaves them out',
           'switch': 'enable_thinking: the chat template leaves it out',
           'calls': "tool_calls in a message of role 'assistant': the chat template leaves them out", 'prompt': 'the generation prompt goes on with',
           'form': 'the chat template refuses these messages'}
NO_TOOLS = {'tools': 'tools', 'result': 'calls', 'given': 'calls'}
NO_SWITCH = {'on': 'switch', 'off': 'switch'}
NO_THOUGHTS = {'thought': 'thoughts', **NO_SWITCH}
PREFILLED = dict.fromkeys(('one', 'all', 'last', 'loss', 'system'), 'prompt')        # the prompt opens a thought that the finished turn doesn't hold
REFUSED = {
    **dict.fromkeys(('cohere2', 'llama3', 'phi3', 'phi3_5', 'qwen2_5_vl'), NO_TOOLS | NO_THOUGHTS),
    **dict.fromkeys(('cohere', 'gemma3'), NO_TOOLS | NO_THOUGHTS | {'given': 'form'}),                                  # question and answer must alternate
    'gemma': NO_TOOLS | NO_THOUGHTS | {'given': 'form', 'system': 'form'},
    **dict.fromkeys(('idefics3', 'llava_next', 'smolvlm'), NO_TOOLS | NO_THOUGHTS | {'result': 'form', 'given': 'form'}),    # an answer must hold something
    'lfm2': NO_TOOLS | NO_THOUGHTS | {'tools': 'calls'},
    **dict.fromkeys(('lfm2_v2', 'llama3_1', 'llama3_2', 'qwen2_5', 'qwen3_instruct_2507', 'qwen3_vl'), NO_THOUGHTS),
    **dict.fromkeys(('gptoss', 'lfm2_2_5', 'lfm2_2_5_v2', 'lfm2_2_5_vl', 'muse_glimmer'), NO_SWITCH),
    **dict.fromkeys(('gemma4', 'gemma4_v2', 'gemma4_v3', 'gemma4_v4'), {'thought': 'thoughts', 'on': 'thoughts'}),        # thoughts are for calls only
    'deepseek_r1_distill': PREFILLED | NO_TOOLS | NO_SWITCH | {'thought': 'prompt', 'inline': 'prompt'},
    'deepseek_r1_distill_training': PREFILLED | NO_TOOLS | NO_SWITCH | {'thought': 'prompt'},
    'deepseekv3': PREFILLED | NO_SWITCH | {'tools': 'tools', 'result': 'prompt', 'thought': 'prompt', 'inline': 'prompt'},
    **dict.fromkeys(('nemotron_3_5_lightning', 'nemotron_3_nano', 'nemotron_3_super', 'nemotron_3_ultra'),
                    PREFILLED | dict.fromkeys(('tools', 'result', 'given'), 'prompt')),
    'qwen3_5_nothink': {'thought': 'prompt', 'inline': 'prompt'},                                                        # the prompt closes the thought
}
EXACT = {'one': 35, 'all': 35, 'last': 35, 'loss': 35, 'system': 34, 'tools': 23, 'result': 23, 'given': 24, 'thought': 16, 'inline': 38,
         'on': 12, 'off': 16}                                                                                              # of 41 published templates
WHOLE = ['diffusion_gemma', 'gemma4_v5', 'glm4moe', 'qwen3', 'qwen3_5_think', 'qwen3_6', 'qwen3_8']                        # nothing is refused
REWRITE = ['diffusion_gemma', 'gemma4_v5', 'glm4moe', 'gptoss', 'lfm2_2_5', 'lfm2_2_5_v2', 'lfm2_2_5_vl', 'nemotron_3_5_lightning', 'nemotron_3_nano',
           'nemotron_3_super', 'nemotron_3_ultra', 'qwen3', 'qwen3_5_think', 'qwen3_6']                                    # the earlier turn's thought goes


def known(name): return REFUSED.get(name, REFUSED.get(name.removesuffix('_training'), {}))


def refusal(name, case, processor, tok, model):
    "None if every row is what it should be, else the reason."
    messages, told, _, trained = ROWS[case]
    data, which = row(case)
    try: rows = encode(to_sample(data, origin='row'), processor, model, which)
    except EncodeError as e:
        assert '\n' not in str(e) and str(e).startswith('row messages[')
        return next((r for r, text in REASONS.items() if text in str(e)), str(e))
    assert len(rows) == len(trained)
    for r, k in zip(rows, trained):
        prompt, said = expected(name, processor, tok, messages, told, k)
        assert r.ids[~r.target].tolist() == prompt
        assert r.ids[r.target].tolist() == said
        assert r.target.tolist() == [False] * len(prompt) + [True] * len(said)
    trees = forest(rows)
    paths = {id(r): t.ids[t.path(i)].tolist() for t in trees for i, r in enumerate(t.rows)}
    assert all(paths[id(r)] == r.ids.tolist() for r in rows)
    assert sum(t.weight.sum() for t in trees) == sum(r.target.sum() for r in rows)


@pytest.mark.parametrize('name', TEMPLATES)
def test_trained_is_what_generation_sees(name):
    parts = made(name)
    found = {case: why for case in ROWS if (why := refusal(name, case, *parts))}
    assert found == known(name)


def test_lists_are_complete():
    "As many as there are; every name in a list is one of theirs; and few are refused where it matters."
    assert (len(PUBLISHED), len(TEMPLATES)) == (41, 72) and set(REFUSED) <= set(TEMPLATES)
    assert [n for n in PUBLISHED if not known(n)] == WHOLE
    exact = {case: sum(case not in known(n) for n in PUBLISHED) for case in ROWS}
    assert exact == EXACT, exact


@pytest.mark.parametrize('name', REWRITE)
def test_a_thought_that_goes_is_kept_by_the_tree(name):
    "The first turn is trained with its thought, the second behind a first turn without; they share what comes before."
    processor, tok, model = made(name)
    rows = encode(to_sample(row('thought')[0]), processor, model)
    assert ['be polite' in tok.decode(r.ids) for r in rows] == [True, False]
    tree, = forest(rows, min_shared=1)
    assert 0 < len(tree) - max(map(len, rows)) < min(map(len, rows))
    assert [tree.ids[tree.path(i)].tolist() for i in range(2)] == [r.ids.tolist() for r in tree.rows]


def test_rewriting_templates_are_listed():
    def goes(name):
        processor, _, model = made(name)
        first, second = encode(to_sample(row('thought')[0]), processor, model)
        return second.ids[:len(first)].tolist() != first.ids.tolist()
    assert [n for n in PUBLISHED if 'thought' not in known(n) and goes(n)] == REWRITE


def test_without_a_model_the_answer_still_ends_or_says_so():
    "GLM's end of turn is known to the model's generation configuration alone."
    processor, _, model = made('glm4moe')
    sample = to_sample(row('one')[0], origin='row')
    assert len(encode(sample, processor, model)) == 1
    with pytest.raises(EncodeError, match='row messages.1.: the template ends an answer with'): encode(sample, processor)
