"Every kind of adapter, through the command: two steps, saved, loaded on the original model, merged."
import json
from copy import deepcopy

import pytest
import torch
from typing import get_args, get_type_hints

import omnilab     # noqa: F401 (torchvision's operators)
from omnilab.models.load import load
from omnilab.objectives.exact import check_forest
from omnilab.train.recipe import AdapterArgs
from omnilab.train.allowed import APART, OF_LORA, OWN
from omnilab.train.sft import main
from omnilab.tune.adapters import KINDS, MOVED, load_adapter, merge
from omnilab.tune.prompts import PROMPTS

CPU = ['--model.dtype', 'float32', '--train.device', 'cpu', '--train.tracker', 'none', '--data.cache', 'false']
OF = {'oft': ['--adapter.options', '{oft_block_size: 16}'], 'fourierft': ['--adapter.options', '{n_frequency: 64}'], 'eva': ['--adapter.options.packs', '2']}


def test_recipe_names_every_kind():
    import peft
    beside = {k for k, v in KINDS.items() if hasattr(getattr(peft, v.config), 'trainable_token_indices')}
    assert set(OF_LORA) == beside - set(MOVED)
    assert set(get_args(get_type_hints(AdapterArgs)['kind'])) == {*OWN, *KINDS}
    assert {k: OWN[k] for k in PROMPTS} == PROMPTS and set(APART) == {'reft', *PROMPTS}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "The shipped tokenizer and processor around a tiny backbone, and rows without media."
    folder = tmp_path_factory.mktemp('base')
    m = load('omni-tiny', dtype='float32')
    config = deepcopy(m.model.config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 2, config.text_config.layer_types[:2]
    torch.manual_seed(0)
    small = type(m.model)(config)
    small.generation_config = m.model.generation_config
    small.save_pretrained(folder/'model'); m.processor.save_pretrained(folder/'model')
    rows = [{'messages': [{'role': 'user', 'content': f'Say {i}.'}, {'role': 'assistant', 'content': str(i)}]} for i in range(8)]
    (folder/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder


def sft(base, out, kind, *words):
    rank = ['--adapter.r', 4] if 'r' in KINDS[kind].told else []
    words = ['--model.name', base/'model', '--data.train', base/'rows.jsonl', '--output', out, '--adapter.kind', kind, *rank, *OF.get(kind, []), *CPU,
             '--adapter.targets', 'language', '--train.max_length', 64, '--train.lr', '1e-2', *words]
    return main([str(w) for w in words], 'omnilab sft')


def logits(model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(): return model.eval()(input_ids=ids, use_cache=False).logits


RARE = 'rslora', 'olora', 'boft', 'oft', 'fourierft', 'loha', 'lokr'      # the same way through peft as others: with --run-slow


@pytest.mark.parametrize('kind', [pytest.param(k, marks=[pytest.mark.slow] * (k in RARE)) for k in KINDS if k not in ('loftq', 'tokens')])
def test_kind(base, tmp_path, kind):
    run = sft(base, tmp_path, kind, '--train.steps', 2)
    told, plain = logits(run.model), load(base/'model', dtype='float32', attn='forest').model
    assert (told - logits(plain)).abs().max() > 1e-3
    again = load_adapter(plain, tmp_path/'adapter')
    findings, _ = check_forest(run.model, run.packs.handles[0].rows[:4])
    assert all(f.ok for f in findings) and len(findings) > 2, findings
    near = dict(atol=1e-4 * told.abs().max().item(), rtol=0)
    torch.testing.assert_close(logits(again), told, **near)
    torch.testing.assert_close(logits(merge(again)), told, **near)
    torch.testing.assert_close(logits(load(tmp_path/'model', dtype='float32', attn='forest').model), told, **near)


@pytest.mark.parametrize('kind', ['dora', 'adalora', 'vera', 'ia3', 'loftq'])
def test_four_bits(base, tmp_path, kind):
    "Beside layers in 4 bits, with scales in 8, on the CPU."
    run = sft(base, tmp_path, kind, '--train.steps', 2, '--model.quantize', 'nf4')
    layer = run.model.get_base_model().model.language_model.layers[0].mlp.up_proj
    assert layer.get_base_layer().weight.quant_state.nested
    whole = load(tmp_path/'model', dtype='float32', attn='forest').model
    if kind == 'loftq':
        with pytest.raises(ValueError, match='completes a base in nf4'): load_adapter(load(base/'model', dtype='float32').model, tmp_path/'adapter')
    else:
        again = load_adapter(load(base/'model', dtype='float32', attn='forest').model, tmp_path/'adapter')
        torch.testing.assert_close(logits(whole), logits(again), atol=1e-4, rtol=1e-4)
    plain = [logits(load(base/'model', dtype='float32', attn='forest', quantize=q, device='cpu').model) for q in ('none', 'nf4')]
    assert (logits(whole) - logits(run.model)).norm() < 2 * (plain[0] - plain[1]).norm()         # no more than rounding


MORE = {'pro': ['--adapter.options.blocks', 1], 'lisa': ['--adapter.options', '{layers: 1, every: 2}']}


@pytest.mark.parametrize('kind', ['adalora', 'pro', 'lisa', 'reft', *(pytest.param(k, marks=pytest.mark.slow) for k in ('pissa', 'vera', 'lora+'))])
def test_resumed(base, tmp_path, kind):
    "Stopped behind a checkpoint and gone on with: the same weights, to the bit."
    class Stop:
        def on_step(self, run): run.stop = run.step == 3
    from omnilab.train.recipe import SFTRecipe, from_args
    from omnilab.train.sft import run
    words = ['--model.name', base/'model', '--data.train', base/'rows.jsonl', '--adapter.kind', kind, *MORE.get(kind, ['--adapter.r', 4]), *CPU,
             '--train.steps', 6, '--train.max_length', 64, '--train.lr', '1e-2']
    recipe = lambda out: from_args(SFTRecipe, [str(w) for w in [*words, '--output', tmp_path/out]])
    whole = run(recipe('a'))
    run(recipe('b'), [Stop()]); again = run(recipe('b'))
    assert again.run.step == 6
    for (n, p), (_, q) in zip(whole.model.state_dict().items(), again.model.state_dict().items()): assert torch.equal(p, q), n


@pytest.mark.parametrize('kind', ['tokens', pytest.param('lora', marks=pytest.mark.slow), pytest.param('none', marks=pytest.mark.slow)])
def test_new_tokens(base, tmp_path, kind):
    "Added, trained, stopped and gone on with, kept with tokenizer and adapter, found again by the verbs; old rows stay to the bit."
    class Stop:
        def on_step(self, run): run.stop = run.step == 2
    from omnilab.lab import load as lab_load
    from omnilab.train.evaluate import open_model
    from omnilab.train.recipe import ModelArgs, SFTRecipe, from_args
    from omnilab.train.sft import run
    rows = tmp_path/'rows.jsonl'
    rows.write_text((base/'rows.jsonl').read_text().replace('"Say', '"<n> Say').replace('"content": "', '"content": "<n>').replace('<n><n>', '<n>'))
    words = ['--model.name', base/'model', '--data.train', rows, '--adapter.kind', kind, '--model.new_tokens', '<n>,</n>', *CPU, '--train.steps', 4,
             '--train.max_length', 64, '--train.lr', '1e-2', '--train.weight_decay', '.1']
    recipe = lambda out, *more: from_args(SFTRecipe, [str(w) for w in [*words, '--output', tmp_path/out, *more]])
    whole = run(recipe('a'))
    run(recipe('b'), [Stop()]); again = run(recipe('b'))
    with pytest.raises(ValueError, match='model.new_tokens.*in the checkpoint'): run(recipe('b', '--model.new_tokens', '<n>,<m>'))
    assert again.run.step == 4
    for (n, p), (_, q) in zip(whole.model.state_dict().items(), again.model.state_dict().items()): assert torch.equal(p, q), n
    plain, told = load(base/'model', dtype='float32').model, logits(whole.model)
    found = [lab_load(tmp_path/'a'/'model', dtype='float32', device='cpu')]
    if kind != 'none': found += [open_model(ModelArgs(str(base/'model'), 'float32', 'forest'), str(tmp_path/'a'/'adapter'), 'cpu')]
    for m in found:
        torch.testing.assert_close(logits(m.model), told, atol=1e-4, rtol=1e-4)
        assert m.processor.tokenizer.encode('<n>') == [len(plain.get_input_embeddings().weight)]
    before, after = (m.get_input_embeddings().weight for m in (plain, found[0].model))
    assert len(after) == len(before) + 2 and after[:-2].equal(before) == (kind != 'none')
    if kind == 'tokens':
        now = found[0].model.state_dict()
        assert all(p.equal(now[n][:len(p)]) for n, p in plain.state_dict().items())
        with pytest.raises(ValueError, match='has its own'):
            open_model(ModelArgs(str(base/'model'), 'float32', 'forest', ['<m>']), str(tmp_path/'a'/'adapter'), 'cpu')


def test_reft(base, tmp_path, capfd):
    "Kept beside the model, never in it; found again by the verbs that take an adapter."
    from omnilab.train.evaluate import open_model
    from omnilab.train.recipe import ModelArgs
    words = ['--model.name', base/'model', '--data.train', base/'rows.jsonl', '--adapter.kind', 'reft', *CPU, '--train.steps', 2, '--output', tmp_path,
             '--adapter.options', '{first: 2, last: 2}']
    run = main([str(w) for w in [*words, '--train.max_length', 64, '--train.lr', '1e-2']], 'omnilab sft')
    assert 'reft changes no weight, and cannot be merged' in capfd.readouterr().err and not (tmp_path/'model').exists()
    again = open_model(ModelArgs(str(tmp_path/'adapter'), 'float32', 'forest'), device='cpu').model
    torch.testing.assert_close(logits(again), logits(run.model))
    findings, _ = check_forest(run.model, run.packs.handles[0].rows[:4])
    assert all(f.ok for f in findings) and len(findings) > 2, findings


@pytest.mark.parametrize('kind', ['prefix', pytest.param('prompt', marks=pytest.mark.slow), pytest.param('p-tuning', marks=pytest.mark.slow)])
def test_prompts(base, tmp_path, capfd, kind):
    "One row a pack: stopped and gone on with, kept, found again, and answered with, row by row as together."
    class Stop:
        def on_step(self, run): run.stop = run.step == 2
    from omnilab.data.parts import Message
    from omnilab.engine.local import LocalEngine
    from omnilab.engine.protocol import Request
    from omnilab.lab import attach
    from omnilab.train.recipe import SFTRecipe, from_args
    from omnilab.train.sft import run
    words = ['--model.name', base/'model', '--data.train', base/'rows.jsonl', '--adapter.kind', kind, '--adapter.options.tokens', 3, *CPU, '--train.steps', 4,
             '--train.packs', 2, '--train.max_length', 64, '--train.lr', '1e-1', '--data.packing', 'false', '--data.merge', 'false']
    recipe = lambda out: from_args(SFTRecipe, [str(w) for w in [*words, '--output', tmp_path/out]])
    whole = run(recipe('a'))
    run(recipe('b'), [Stop()]); again = run(recipe('b'))
    for (n, p), (_, q) in zip(whole.model.state_dict().items(), again.model.state_dict().items()): assert torch.equal(p, q), n
    assert 'cannot be merged' in capfd.readouterr().err and not (tmp_path/'a'/'model').exists()
    found = attach(tmp_path/'a').model
    torch.testing.assert_close(logits(found.model), logits(whole.model), atol=1e-5, rtol=1e-5)
    assert (logits(found.model)[:, -20:] - logits(load(base/'model', dtype='float32').model)).abs().max() > 1e-3
    asked = [Request([Message('user', text)], max_new_tokens=3) for text in ('Say 1.', 'Say 1, and then say 2 and 3.')]
    both = LocalEngine(found.model, found.processor).generate(asked)
    for r, c in zip(asked, both):
        [one] = LocalEngine(found.model, found.processor).generate([r])
        assert one.token_ids == c.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(c.logprobs))


@pytest.mark.parametrize('words, said', [
    (['ia3', '--adapter.r', '4'], 'r = 4: ia3 has none'),
    (['vera', '--adapter.options.d_initiall', '1'], 'options.d_initiall: no such option of vera; it has'),
    (['pissa', '--model.quantize', 'nf4'], 'is quantised; expected one of lora'),
    (['loftq'], 'begins with what 4 bits lose'),
    (['adalora', '--adapter.options.tinit', '9', '--train.steps', '4'], 'expected less than the 4 steps'),
    (['tokens'], 'there are no new ones; expected model.new_tokens'),
    (['vera', '--model.new_tokens', '<box>'], 'they would not be trained; expected tokens, lora'),
    (['lora', '--model.new_tokens', '<|end|>'], "new token '<|end|>': the tokenizer has it already"),
    (['prompt'], 'expected data.packing: false and data.merge: false'),
    (['prefix', '--data.packing', 'false', '--data.merge', 'false', '--train.checkpointing'], 'layers that are computed again forget it'),
    (['lorra'], 'expected none, lora, rslora'),
    (['lisa', '--adapter.r', '4'], "adapter.r = 4: kind 'lisa' has no such setting"),
    (['pro', '--model.quantize', 'nf4'], 'quantised weights cannot move'),
])
def test_one_line(base, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as e:
        main([str(w) for w in ['--model.name', base/'model', '--data.train', base/'rows.jsonl', '--output', tmp_path, *CPU, '--adapter.kind', *words]],
             'omnilab sft')
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('omnilab sft:')]
    assert e.value.code == 2 and len(err) == 1 and said in err[0], err
