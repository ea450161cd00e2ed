"""What frozen towers make is made once: the same step without them, nothing kept that could differ, and no process waits."""
import json, os, subprocess, sys
from functools import wraps
from pathlib import Path

import families as f
import pytest
import torch

TAKES = {'ours': ['image', 'audio', 'video'], 'qwen2_5_vl': ['image', 'video'], 'qwen3_vl': ['image', 'video'], 'gemma3': ['image'],
         'llava_onevision': ['image', 'video'], 'internvl': ['image'], 'idefics3': ['image'], 'llama4': ['image'], 'gemma4': ['image', 'audio'],
         'qwen2_5_omni': ['image', 'audio', 'video'], 'qwen3_omni': ['image', 'audio', 'video'], 'voxtral_parts': ['audio'],
         'qwen2_audio': ['audio']}
HANDED = {'gemma4', 'qwen2_audio', 'qwen2_5_omni', 'qwen3_omni', 'voxtral_parts'}      # sounds in the place of their inputs: no keyword takes them


def family(name):
    "A model of which only the language model learns, and its encoder."
    import omnilab, transformers     # noqa: F401 (omnilab first: torchvision)
    from omnilab.forest.context import Encoder
    from test_mixed_ranks import ours
    torch.manual_seed(0)
    model, processor = (ours if name == 'ours' else getattr(f, name))(transformers)
    f.alive(model, model.generation_config.eos_token_id if name == 'ours' else 1).requires_grad_(False)
    model.get_decoder().requires_grad_(True)
    return model, Encoder(processor, model)


def row(enc, kinds, seed=0):
    from omnilab.data.parts import Message, Part, Sample
    from omnilab.forest.dummy import medium
    from omnilab.forest.encode import encode
    seen = [medium(kind, seed + i) for i, kind in enumerate(kinds)]
    r, = encode(Sample([Message('user', [*seen, Part('text', 'how many are there ?')]), Message('assistant', 'two of them')], origin=f'd:{seed}'), enc)
    return r


def step(scorer, rows):
    "Log-probabilities and gradients of a training step."
    from omnilab.forest.bins import collate
    from omnilab.forest.tree import forest
    scorer.train(); scorer.zero_grad()
    stats = scorer(collate(forest(rows)))
    stats.logp.sum().backward()
    return stats.logp.detach(), {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}


def counted(model, kinds):
    "Runs of the model's towers from now on."
    seen = []
    for kind in kinds:
        name = f'get_{kind}_features'
        own = getattr(model.base_model, name, None)
        if own is None:
            def called(tower, args, kind=kind): seen.extend([kind] * torch.is_tensor(args[0]))
            model.base_model.get_submodule(f'{kind}_tower').register_forward_pre_hook(called)
            continue
        def run(*a, own=own, kind=kind, **kw):
            if torch.is_tensor(next(iter([*a, *kw.values()]))): seen.append(kind)       # else an output is handed over
            return own(*a, **kw)
        setattr(model.base_model, name, wraps(own)(run))
    return seen


@pytest.fixture(scope='module', params=TAKES)
def case(request):
    from omnilab.forest.towers import study
    model, enc = family(request.param)
    return request.param, model, enc, study(model, enc)


def test_kinds(case):
    name, model, enc, towers = case
    assert sorted(towers.known) == sorted(TAKES[name]) and all('num_frames_per_video' in why for why in towers.wrong.values())
    assert towers.stays == set() and {k for k, t in towers.known.items() if t.place} == ({'audio'} if name in HANDED else set())
    assert not model.training


def test_same_step_to_the_bit(case):
    "A row of one medium, and one of two: what is learned does not show whether a tower ran."
    from omnilab.objectives.score import Scorer
    name, model, enc, towers = case
    scorer = Scorer(model)
    for kinds in [[k] for k in TAKES[name]] + [[TAKES[name][0]] * 2]:
        r = row(enc, kinds)
        (logp, grads), done = step(scorer, [r]), towers(r)
        assert not any(k in done.media for k in towers.reads(r)) and not towers.reads(done)
        seen = counted(model, TAKES[name])
        logp_too, grads_too = step(scorer, [done])
        assert not seen and logp.equal(logp_too) and grads.keys() == grads_too.keys()
        for n in grads: assert grads[n].equal(grads_too[n]), (kinds, n)


def test_same_step_of_many_rows(case):
    "The tower of a step sees all rows in one batch, whose sums may be added up in another order."
    from omnilab.objectives.score import Scorer
    name, model, enc, towers = case
    rows = [row(enc, [k], i) for k in TAKES[name] for i in range(2)] + [row(enc, [])]
    (logp, grads), (logp_too, grads_too) = (step(Scorer(model), rs) for rs in (rows, [towers(r) for r in rows]))
    torch.testing.assert_close(logp_too, logp, atol=1e-6, rtol=1e-6)
    for n in grads: assert (grads[n] - grads_too[n]).abs().max() <= 1e-5 * (1 + grads[n].abs().max()), n


def test_sounds_stay_where_the_forward_has_no_place_for_them():
    "An image's tower is spared, the sound's runs; both in one row."
    from omnilab.forest.towers import study
    from omnilab.objectives.score import Scorer
    model, enc = family('gemma4')
    class Looks(type(model)):
        def forward(self, input_features=None, **kw): return super().forward(input_features=None if input_features is None else input_features + 0, **kw)
    model.__class__ = Looks
    towers, r = study(model, enc), row(enc, ['image', 'audio'])
    done = towers(r)
    assert 'pixel_values' not in done.media and 'input_features' in done.media and towers.stays == {'input_features', 'input_features_mask'}
    assert step(Scorer(model), [r])[0].equal(step(Scorer(model), [done])[0])


def test_what_a_forward_looks_at_goes_in_beside(tmp_path):
    "Gemma 4 asks for the mask of its sounds before it asks their tower; outputs as long as each sound, kept and joined."
    from omnilab.data.media import Audio
    from omnilab.data.samples import Message, Part, Sample
    from omnilab.forest.encode import encode
    from omnilab.forest.towers import study, through
    from omnilab.objectives.score import Scorer
    model, enc = family('gemma4')
    def hears(i, *lengths):
        waves = [Part('audio', Audio(torch.randn(n, generator=torch.Generator().manual_seed(n)).clamp(-3, 3).numpy() / 4, enc.rate)) for n in lengths]
        return encode(Sample([Message('user', [*waves, Part('text', 'what ?')]), Message('assistant', 'two of them')], origin=f'd:{i}'), enc)[0]
    towers, rows = study(model, enc), [row(enc, ['image', 'audio']), hears(1, 8000), hears(2, 12_345, 3200), hears(3, 16_001)]
    assert towers.known['audio'].beside == ('input_features_mask',) and len({r.media['input_features_mask'].shape[-1] for r in rows}) > 1
    done, seen = through(rows, towers, tmp_path), counted(model, ['audio', 'image'])
    assert all('input_features' not in r.media and 'input_features_mask' in r.media for r in done)
    want = step(Scorer(model), rows)[0]
    seen.clear()
    torch.testing.assert_close(step(Scorer(model), done)[0], want, atol=1e-6, rtol=1e-6)
    assert not seen


def test_sounds_under_adapters_and_in_a_copy():
    "PEFT calls the model's forward past its hooks; a copy has functions of its own."
    from copy import deepcopy
    from omnilab.forest.towers import study
    from omnilab.objectives.score import Scorer
    from peft import LoraConfig, get_peft_model
    model, enc = family('qwen2_5_omni')
    whole = get_peft_model(model, LoraConfig(target_modules=r'.*model\.layers.*q_proj', init_lora_weights=False))
    towers, r = study(whole.get_base_model(), enc), row(enc, ['image', 'audio'])
    done, seen = towers(r), counted(model, ['audio'])
    assert 'input_features' not in done.media
    (logp, grads), seen_before = step(Scorer(whole), [r]), len(seen)
    logp_too, grads_too = step(Scorer(whole), [done])
    assert len(seen) == seen_before == 1 and logp.equal(logp_too) and grads and all(g.equal(grads_too[n]) for n, g in grads.items())
    del vars(model)['get_audio_features']
    study(model, enc)
    copy = deepcopy(model)
    with torch.no_grad(): copy.audio_tower.conv1.weight.mul_(2)
    assert copy.get_audio_features.__self__ is copy and not step(Scorer(copy), [r])[0].equal(logp)
    assert step(Scorer(copy), [done])[0].equal(logp)


def test_model_that_takes_none_is_refused():
    from omnilab.forest.towers import TowerError, study, through
    model, enc = family('qwen2_audio')
    class Looks(type(model)):
        def forward(self, input_features=None, **kw): return super().forward(input_features=None if input_features is None else input_features + 0, **kw)
    model.__class__ = Looks
    with pytest.raises(TowerError, match='Looks takes no outputs of towers for feature_attention_mask, input_features'):
        through([row(enc, ['audio'])], study(model, enc))


@pytest.mark.parametrize('what, trained', [('tower', 'visual.blocks.0'), ('projector', 'visual.merger'), ('layers between', 'visual.deepstack_merger_list')])
def test_what_is_trained_is_refused(what, trained):
    from omnilab.forest.towers import TowerError, study, through
    model, enc = family('qwen3_vl')
    model.model.get_submodule(trained).requires_grad_(True)
    towers = study(model, enc)
    with pytest.raises(TowerError, match=rf'image: \d+ tensors that make its outputs are trained \(model\.{trained}.*; expected all of them frozen'):
        through([row(enc, ['image'])], towers)
    assert through([row(enc, [])], towers)


def test_dropout_is_refused():
    from omnilab.forest.towers import TowerError, study, through
    model, enc = family('gemma3')
    for m in model.model.vision_tower.modules():
        if hasattr(m, 'dropout') and isinstance(m.dropout, float): m.dropout = .1
    with pytest.raises(TowerError, match='image: what its tower makes is random in training'): through([row(enc, ['image'])], study(model, enc))


def test_second_time_nothing_runs_until_a_weight_moves(tmp_path):
    from omnilab.forest.towers import study, through
    model, enc = family('qwen3_vl')
    rows, seen = [row(enc, ['image'], i % 2) for i in range(4)], counted(model, ['image', 'video'])
    def again(change=lambda: None):
        change()
        towers = study(model, enc)
        seen.clear()
        return through(rows, towers, tmp_path), len(seen)
    (one, n), (two, zero) = again(), again()
    assert (n, zero) == (2, 0)                                  # two pictures, four rows
    for a, b in zip(one, two): assert a.media.keys() == b.media.keys() and all(a.media[k].equal(b.media[k]) for k in a.media)
    def move():
        with torch.no_grad(): model.model.visual.merger.linear_fc2.bias[0] += 1e-3
    moved, n = again(move)
    assert n == 2 and not any(moved[0].media[k].equal(one[0].media[k]) for k in one[0].media if 'pooler' in k)
    def teach():
        with torch.no_grad(): model.lm_head.weight[0] += 1
    assert again(teach)[1] == 0                                 # the language model may learn
    assert again(lambda: model.model.visual.to(torch.float64).to(torch.float32))[1] == 0
    assert again(lambda: model.to(torch.bfloat16))[1] == 2


def test_broken_shard_is_made_again(tmp_path):
    from omnilab.forest.towers import study, through
    model, enc = family('gemma3')
    rows, towers = [row(enc, ['image'])], study(model, enc)
    want = {k: v.clone() for k, v in through(rows, towers, tmp_path)[0].media.items()}
    path, = tmp_path.glob(f'{towers.name}-*.safetensors')
    data = bytearray(path.read_bytes()); data[-3] ^= 1; path.write_bytes(data)
    with pytest.warns(UserWarning, match='broken'): got = {k: v for k, v in through(rows, towers, tmp_path)[0].media.items()}
    assert all(got[k].equal(want[k]) for k in want)


# --- in a recipe

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    from omnilab.data.world.write import write
    return write(tmp_path_factory.mktemp('world'), 8, 'train', 0, ['motion', 'ocr'])


def recipe(world, out, *more):
    from omnilab.train.recipe import from_args, SFTRecipe
    return from_args(SFTRecipe, ['--data.train', str(world), '--train.steps', '3', '--train.device', 'cpu', '--output', str(out), *more])


def test_same_run(world, tmp_path):
    "The losses of a run with its towers and of one without; no tower runs in a step."
    from omnilab.train.sft import run
    told, got = ['--adapter.targets', 'language', '--train.max_length', '512', '--train.packs', '2'], []
    for i, more in enumerate([[], ['--data.towers'], ['--data.towers', '--data.cache', 'false']]):
        r = run(recipe(world, tmp_path/str(i), *told, *more))
        got.append([json.loads(line)['loss'] for line in (r.folder/'metrics.jsonl').read_text().splitlines()])
        names = {k for h in r.packs.handles for k in h.media}
        assert names and all(k.startswith('mm_encoder_outputs.') for k in names) == bool(more)
    for losses in got[1:]: torch.testing.assert_close(torch.tensor(losses), torch.tensor(got[0]), atol=1e-5, rtol=1e-5)


def test_refusals_of_recipes(world, tmp_path):
    from omnilab.train.recipe import RecipeError
    from omnilab.train.sft import run
    with pytest.raises(RecipeError, match='data.towers: .* tensors that make its outputs are trained .*lora'): run(recipe(world, tmp_path, '--data.towers'))
    with pytest.raises(RecipeError, match='data.towers with data.streaming'): run(recipe(world, tmp_path, '--data.towers', '--data.streaming'))
    with pytest.raises(RecipeError, match='data.towers: the rows are packed already'): run(recipe(world, tmp_path, '--data.towers'), packs=[])


def test_packs_of_towers_that_move_are_refused(world, tmp_path):
    "Packs that were made in a run of frozen towers, given to one that trains them."
    from omnilab.train.recipe import RecipeError
    from omnilab.train.assemble import prepare_run
    from omnilab.train.feed import plan_packs, read_files
    from omnilab.train.model import load_model
    from omnilab.train.ready import towered
    frozen = recipe(world, tmp_path, '--adapter.targets', 'language', '--data.towers')
    loaded = load_model(frozen)
    packs = plan_packs(read_files(frozen), loaded, frozen, towered)
    prepare_run(frozen, loaded, packs)
    with pytest.raises(RecipeError, match='the packs hold what towers made, but .* are trained'): prepare_run(recipe(world, tmp_path), loaded, packs)


def test_help_says_who_can(capsys):
    from omnilab.train.recipe import SFTRecipe, help_text
    text = help_text(SFTRecipe, 'omnilab sft')
    assert 'mm_encoder_outputs' in text[text.index('--data.towers'):][:400]


# --- codes of media that are written are tokens: kept with the row

def test_codecs_run_once(tmp_path, monkeypatch):
    from omnilab.data.parts import Message, Sample
    from omnilab.forest.cache import encode_once
    from omnilab.forest.dummy import medium
    from omnilab.models.codecs import AudioCodec, ImageCodec
    from omnilab.models.load import load
    m, calls = load('omni-tiny'), []
    for kind in (ImageCodec, AudioCodec):
        own = kind.encode
        monkeypatch.setattr(kind, 'encode', lambda self, *a, own=own, **kw: (calls.append(type(self).__name__), own(self, *a, **kw))[1])
    drawn = [Sample([Message('user', 'draw'), Message('assistant', [medium(k, i)])], origin=f'd:{k}') for i in range(2) for k in ('image', 'audio')]
    one = encode_once(drawn, m.processor, m.model, tmp_path)
    assert len({*calls}) == 2 and not any(r.media for r in one)
    calls.clear()
    two = encode_once(drawn, m.processor, m.model, tmp_path)
    assert not calls and two.misses == 0 and all(a.ids.equal(b.ids) for a, b in zip(one, two))


# --- several processes, of which one has media and the other none

def learned(name):
    "Losses and weights of a run of two packs a step, without a tower."
    from functools import partial
    from omnilab.forest.bins import collate
    from omnilab.forest.dummy import complete, dummies
    from omnilab.forest.loader import Loader
    from omnilab.forest.towers import study
    from omnilab.forest.tree import forest
    from omnilab.objectives.score import Scorer
    from omnilab.objectives.sft import sft_objective, size
    from omnilab.train.loop import accelerator, prepare, train
    from omnilab.train.optim import optimizers, schedule
    model, enc = family(name)
    towers, rows = study(model, enc), []
    packs = [collate(forest([towers(row(enc, kinds, i))])) for i, kinds in enumerate([['image'], [], [], ['image'], [], [], ['video'], [], [], ['video']])]
    seen, whole = counted(model, TAKES[name]), partial(complete, dummies=dummies(packs, enc, towers))
    made = len(seen); seen.clear()
    keep = type('Keep', (), {'on_step': lambda self, run: rows.append(run.metrics['loss'])})()
    run = prepare(Scorer(model), optimizers(model, lr=.01), accelerator(device='cpu'), map(whole, packs[:2]), complete=whole, data=Loader(packs, shuffle=False),
                  objective=sft_objective(), size=size, schedule=schedule('constant', 5), steps=5, packs=2)
    train(run, [keep])
    return {'losses': rows, 'runs': len(seen), 'dummies': made, 'weights': {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}}


def shared(folder):
    "Both processes make what is missing, each its part, and read all of it."
    import accelerate
    from omnilab.forest.towers import study, through
    accelerate.PartialState(cpu=True)
    model, enc = family('gemma3')
    rows, towers, seen = [row(enc, ['image'], i) for i in range(4)], study(model, enc), counted(model, ['image'])
    out = through(rows, towers, folder)
    return {'made': len(seen), 'same': all(v.equal(towers(r).media[k]) for r, o in zip(rows, out) for k, v in o.media.items())}


def worker(out, folder):
    result = {name: learned(name) for name in ('ours', 'qwen3_vl')} | {'shared': shared(folder)}
    if int(os.environ['RANK']) == 0: torch.save(result, out)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp('ranks'), []
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': f'{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}'}
    for n in (1, 2):
        cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', n, __file__, folder/f'{n}.pt', folder/f'cache{n}']
        done = subprocess.run([*map(str, cmd)], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        out.append(torch.load(folder/f'{n}.pt', weights_only=True))
    return out


@pytest.mark.parametrize('name', ['ours', 'qwen3_vl'])
def test_as_one_process(results, name):
    one, two = (r[name] for r in results)
    assert one['runs'] == two['runs'] == 0 and one['dummies'] == two['dummies'] > 0
    assert len(one['losses']) == 5
    torch.testing.assert_close(torch.tensor(two['losses']), torch.tensor(one['losses']), atol=1e-4, rtol=1e-4)
    for n, w in one['weights'].items(): torch.testing.assert_close(two['weights'][n], w, atol=2e-4, rtol=1e-3)


def test_work_is_shared(results):
    assert [r['shared'] for r in results] == [{'made': 4, 'same': True}, {'made': 2, 'same': True}]


if __name__ == '__main__': worker(*sys.argv[1:])
