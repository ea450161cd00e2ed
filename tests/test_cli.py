"The command in processes of its own: what it prints, with which status, how fast, and what it doesn't import."
import json, re, shutil

import pytest, yaml
from conftest import ROOT, run

COMMANDS = 'sft', 'launch', 'eval', 'infer', 'world', 'data', 'prepare', 'memory', 'compare', 'cache', 'merge', 'check'


def omnilab(*argv, **kw): return run(['-m', 'omnilab.cli', *argv], **kw)[0]


def mistake(*argv, **kw):
    "What a command says that fails: one line, nothing else, status 2."
    done = omnilab(*argv, **kw)
    assert (done.returncode, done.stdout) == (2, ''), done.stdout + done.stderr
    assert done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr, done.stderr
    return done.stderr.strip()


# --- help: complete, quick, without torch

def recipe_of(command):
    "The dataclass behind a command."
    from omnilab import programs
    from omnilab.memory.planner import MemoryRecipe
    from omnilab.train import evaluate, launch, merge, prepare, recipe
    return dict(sft=recipe.SFTRecipe, launch=launch.LaunchRecipe, eval=evaluate.EvalRecipe, infer=evaluate.InferRecipe,
                check=evaluate.CheckRecipe, merge=merge.MergeRecipe,
                prepare=prepare.PrepareRecipe, world=programs.WorldRecipe, data=programs.DataRecipe, cache=programs.CacheRecipe, memory=MemoryRecipe,
                compare=programs.CompareRecipe)[command]


@pytest.mark.parametrize('argv', [('--help',), *((c, '--help') for c in COMMANDS), ('sft', '--print-config')], ids=' '.join)
def test_help_is_quick_and_light(argv, record_property):
    code = f'import sys\nfrom omnilab.cli import main\ntry: main({list(argv)})\nfinally: print(*sys.modules, file=sys.stderr)'
    done, cpu = run(['-c', code])
    record_property('cpu', round(cpu, 2))
    assert done.returncode == 0 and done.stdout
    heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'matplotlib', 'sklearn', 'scipy', 'numpy', 'PIL'} & set(done.stderr.split())
    assert not heavy, f'omnilab {" ".join(argv)} imports {heavy}'


def test_no_torch_by_import_time():
    "The interpreter's own list of imports agrees."
    done, _ = run(['-X', 'importtime', '-m', 'omnilab.cli', 'sft', '--help'])
    assert 'omnilab.train.recipe' in done.stderr and not re.search(r'\| +(torch|transformers)\b', done.stderr)


@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_complete(command):
    from omnilab.train.recipe import describe, options
    text = omnilab(command, '--help').stdout
    for o in options(recipe_of(command)): assert f'--{o.name}\n' in text and o.help in text and describe(o.type) in text, o.name
    assert '--print-config' in text and f'omnilab {command}' in text


def test_top_level():
    done = omnilab('--help')
    assert all(f'\n  {c} ' in done.stdout for c in ('demo', *COMMANDS))
    assert omnilab().stdout == done.stdout
    assert omnilab('--version').stdout.startswith('omnilab ')


def test_installed_script_is_the_same():
    import tomllib
    assert tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['scripts']['omnilab'] == 'omnilab.cli:main'


# --- the recipe: file, overrides, what is shown can be run

def test_print_config_reads_back(tmp_path):
    from omnilab.train.recipe import SFTRecipe, from_args
    (tmp_path/'r.yaml').write_text('train:\n  lr: 1e-4\nadapter: {targets: [language]}\n')
    shown = omnilab('sft', tmp_path/'r.yaml', '--train.steps', '7', '--print-config').stdout
    values = yaml.safe_load(shown)
    assert (values['train']['lr'], values['train']['steps'], values['adapter']['targets']) == (1e-4, 7, ['language'])
    (tmp_path/'again.yaml').write_text(shown)
    assert from_args(SFTRecipe, [str(tmp_path/'again.yaml')]) == from_args(SFTRecipe, [str(tmp_path/'r.yaml'), '--train.steps', '7'])


@pytest.mark.parametrize('command, words, wanted', [('eval', ['m', 'd.jsonl'], {'model': 'm', 'data': 'd.jsonl'}), ('infer', ['m'], {'model': 'm'})])
def test_words_without_names(command, words, wanted):
    shown = yaml.safe_load(omnilab(command, *words, '--print-config').stdout)
    assert {k: shown[k]['name'] if k == 'model' else shown[k] for k in wanted} == wanted


# --- mistakes: one line each, before anything is loaded

@pytest.mark.parametrize('argv, line', [
    (['sfft'], "omnilab: 'sfft': no such command; did you mean sft?"),
    (['sft', '--train.lrr', '1'], 'omnilab sft: command line train.lrr: no such option; did you mean train.lr?'),
    (['sft', '--learning_rate', '1e-4'], 'omnilab sft: command line learning_rate: no such option; did you mean train.lr?'),
    (['sft', '--model', 'x'], 'omnilab sft: command line model: no such option; did you mean model.name?'),
    (['eval', '--on_error', 'drop'], "omnilab eval: command line on_error = 'drop': expected raise or skip"),
    (['sft', '--train.lr', 'fast'], "omnilab sft: command line train.lr = 'fast': expected a number, 0 or more"),
    (['sft', '--train.lr'], 'omnilab sft: command line --train.lr: no value; expected a number, 0 or more'),
    (['sft', 'rows.jsonl'], "omnilab sft: 'rows.jsonl': expected a recipe (RECIPE.yaml), then --name value"),
    (['sft'], 'omnilab sft: data.train: not given; expected a file of rows'),
    (['sft', '--data.train', 'nowhere.jsonl'], "omnilab sft: data.train = 'nowhere.jsonl': no such file"),
    (['eval', 'omni-tiny'], 'omnilab eval: no rows to ask; expected --data FILE'),
    (['eval', 'omni-tiny', 'nowhere.jsonl'], 'omnilab eval: nowhere.jsonl'),
    (['eval', 'a', 'b', 'c'], "omnilab eval: 'c': expected NAME DATA"),
    (['infer', 'omni-tiny'], 'omnilab infer: nothing is asked; expected --text, --image, --audio or --video'),
    (['infer', 'omni-tiny', '--image', 'nowhere.png'], 'omnilab infer: nowhere.png'),
    (['merge', 'omni-tiny'], 'omnilab merge: omni-tiny: no adapter; expected --adapter FOLDER'),
    (['prepare'], 'omnilab prepare: no rows to look at; expected FILE, or --data FILE'),
    (['sft', '--data.train', 'gsm9k'], "omnilab sft: data.train = 'gsm9k': no such file, and no card of that name; did you mean gsm8k?"),
    (['prepare', 'no.jsonl'], 'omnilab prepare: no.jsonl: no such file, and no card of that name; expected a file or folder of rows, hf:NAME or a card'),
    (['prepare', 'gsm9k'], 'omnilab prepare: gsm9k: no such file, and no card of that name; did you mean gsm8k?'),
    (['world'], 'omnilab world: --out FOLDER: not given'),
    (['world', 'w', '--split', 'tset'], "omnilab world: command line split = 'tset': expected train, test or novel"),
    (['world', 'w', '--tasks', 'fly'], 'omnilab world: world: tasks')], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_mistakes_are_one_line(argv, line, tmp_path):
    assert mistake(*argv, cwd=tmp_path, PYTHONPATH=str(ROOT)).startswith(line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text, line', [
    ('train: [\n', 'r.yaml:2: not YAML'), ('train:\n  steps: 3\n  epoch: 2\n', 'r.yaml:3 train.epoch: no such option; did you mean train.epochs?'),
    ('train: 3\n', 'r.yaml:1 train: expected "name: value" lines'), ('output: a\noutput: b\n', 'r.yaml:2 output: given twice'),
    ('train:\n  steps: -1\n', 'r.yaml:2 train.steps = -1: expected a whole number, 0 or more')])
def test_bad_yaml_is_one_line(text, line, tmp_path):
    (tmp_path/'r.yaml').write_text(text)
    assert mistake('sft', 'r.yaml', cwd=tmp_path, PYTHONPATH=str(ROOT)).startswith(f'omnilab sft: {line}')


def test_bad_settings_are_one_line():
    assert 'OMNILAB_MEDIA_PIXLES' in mistake('sft', '--help', OMNILAB_MEDIA_PIXLES='3')


def test_stopped_by_the_keyboard_says_how_to_go_on(monkeypatch, capsys):
    from omnilab import cli
    def program(*_): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'load_program', lambda c: program)
    assert cli.run('sft', []) == cli.run('eval', []) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith('omnilab sft: stopped by the keyboard; the same command goes on') and said[1] == 'omnilab eval: stopped by the keyboard'


def test_traceback_when_asked_for(tmp_path):
    done = omnilab('infer', './nowhere', '--text', 'hi', '--traceback', cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and 'Traceback' in done.stderr and 'LoadError' in done.stderr
    assert done.stderr.splitlines()[-1] != '' and "omnilab infer: model './nowhere': expected a folder with a config.json" in done.stderr


# --- from end to end, on a model that is made here

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A tiny untrained model of the embedded kind, with codecs for pictures and sounds, and a few rows of the world."
    import numpy as np, torch
    from omnilab.data.media import Audio
    from omnilab.data.world.tasks import World
    from omnilab.data.world.write import write
    from omnilab.models.codecs import AudioCodec, ImageCodec, KMeansVQ
    from omnilab.models.omni import OmniConfig, OmniForConditionalGeneration
    from omnilab.models.processor import OmniProcessor, build_tokenizer
    at = tmp_path_factory.mktemp('cli')
    tok = build_tokenizer(['How many red shapes are there?'], text_vocab=280, codes={'image': 32, 'audio': 16})
    sizes = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                 max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    ids = {f'{k}_token_id': tok.convert_tokens_to_ids(f'<|{k}|>') for k in ('image', 'video', 'audio')}
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=48, patch_size=8)
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(sizes, vision, audio_width=16, pad_token_id=0, eos_token_id=1, **ids))
    processor = OmniProcessor(tok)
    pictures = [World(0).sample('draw', i).messages[-1].parts[0].value for i in range(8)]
    beeps = [Audio(.5 * np.sin(2 * np.pi * f * np.arange(960) / 8000), 8000) for f in (500, 700, 900)]
    processor.codecs = {'image': ImageCodec(KMeansVQ(32)).fit(pictures), 'audio': AudioCodec(KMeansVQ(16)).fit(beeps)}
    model.save_pretrained(at/'model'); processor.save_pretrained(at/'model')
    write(at/'rows', 4, tasks=['count', 'dial'])
    return at


def test_world_writes_and_eval_scores(place):
    done = omnilab('world', '--out', place/'w', '--n', '6', '--split', 'test', '--tasks', 'count,tones,motion')
    assert done.returncode == 0, done.stderr
    path = place/'w'/re.search(r'([\w.-]+\.jsonl)', done.stdout)[1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {r['task'] for r in rows} == {'count', 'tones', 'motion'}
    assert all((place/'w'/m).is_file() for r in rows for k in ('images', 'audios', 'videos') for m in r.get(k, []))
    done = omnilab('eval', place/'model', path, '--ask.max_new_tokens', '4', '--output', place/'scores')
    assert done.returncode == 0, done.stderr
    kept = json.loads((place/'scores/scores.json').read_text())
    assert {t: s['n'] for t, s in kept['tasks'].items()} == {'count': 2, 'tones': 2, 'motion': 2}
    assert all(t in done.stdout for t in kept['tasks'])


def test_infer_prints_and_writes(place):
    image = next((place/'rows').rglob('*.png'), None) or next((place/'rows').rglob('*.jpg'))
    how = '--ask.max_new_tokens', '60', '--ask.temperature', '3', '--out', place/'out'
    done = omnilab('infer', place/'model', '--text', 'Draw it.', '--image', image, *how)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    made = re.findall(r'^(?:image|audio) (\S+)$', done.stdout, re.M)
    assert all((place/'out'/name.rpartition('/')[2]).is_file() for name in made)


def test_check_reads_no_weights(place, tmp_path):
    bare = shutil.copytree(place/'model', tmp_path/'bare', ignore=shutil.ignore_patterns('model*'))
    done = omnilab('check', bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'twin of {bare}: all is well' in done.stdout and 'text → audio' in done.stdout
    done = omnilab('check', bare, '--weights')
    assert done.returncode == 2 and 'all is well' not in done.stdout and done.stderr.count('\n') == 1, done.stderr


def test_check_of_the_weights(place):
    done = omnilab('check', place/'model', '--weights')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'all is well' in done.stdout and 'twin of' not in done.stdout
