"""Every card of a public data set: its facts are there and have a source, and its example becomes a sample of the kinds that it claims."""
import json, re, shutil, subprocess, sys
from collections import Counter

import numpy as np, pytest, yaml
from conftest import ROOT, run
from PIL import Image

from omnilab.data import cards
from omnilab.data.media import Audio, Video, save_audio, save_image, save_video
from omnilab.data.parts import RowError
from omnilab.data.samples import read

NAMES = cards.names()
AT_LEAST = dict(text=25, image=30, video=10, audio=15, grounding=8, preference=12, rl=10)
PLACES = re.compile(r'https?:|www\.|\b[\w-]+\.(?:com|org|net|io|ai|cn|edu|co)\b(?!/)')      # a file of a repository may be named; no host may
# What a task takes and gives at least. A group of reinforcement learning has no answer to imitate, so what it gives isn't in its rows.
NEEDS = dict(caption={'image', 'video', 'audio'}, vqa={'image', 'video'}, ocr={'image'}, transcribe={'audio'}, ground={'image'}, detect={'image'})
REWARDS = {'answer', 'tests'}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A folder in which every medium that an example names exists."
    folder = tmp_path_factory.mktemp('cards')
    save_image(Image.new('RGB', (64, 48), 'orange'), folder/'a.png')
    save_audio(Audio(.5 * np.sin(np.arange(800) / 5), 8000), folder/'a.wav')
    save_video(Video(np.zeros((4, 32, 32, 3), np.uint8), 4), folder/'a.mp4')
    for name in NAMES:
        for path in media(cards.to_row(cards.card(name), cards.card(name).example)):
            (folder/path).parent.mkdir(parents=True, exist_ok=True)
            if not (folder/path).exists(): shutil.copy(folder/{'jpg': 'a.png'}.get(path.rpartition('.')[2], 'a.' + path.rpartition('.')[2]), folder/path)
    return folder


def media(row):
    "Files that a row names."
    for kind in 'images', 'audios', 'videos':
        value = row.get(kind, [])
        for v in value if isinstance(value, list) else [value]:
            if not v.startswith('data:'): yield v


def kinds(sample):
    "What goes in, and what comes out; a call of a tool is text that is trained."
    out = sample.kinds('assistant', 'document') | ({'text'} if any(m.tool_calls for m in sample.messages) else set())
    return sample.kinds('user', 'system', 'tool'), out


def test_enough_of_every_group():
    many = Counter(cards.card(n).group for n in NAMES)
    assert len(NAMES) >= 200 and set(many) == set(cards.GROUPS)
    assert all(many[g] >= n for g, n in AT_LEAST.items()), many


def test_no_data_set_twice():
    ids = Counter((hub, i, c.config, c.split) for c in map(cards.card, NAMES) for hub, i in c.id.items())
    assert [i for i, n in ids.items() if n > 1] == []
    assert all(re.fullmatch(r'[a-z0-9_]+', n) for n in NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_card(name, root):
    c = cards.card(name)
    assert all(re.fullmatch(r'[\w.-]+(/[\w.-]+)?', i) for i in c.id.values())
    assert all(len(s) > 10 for s in c.source) and 'loading' in c.unchecked and len(set(c.unchecked)) == len(c.unchecked)
    assert c.about.count('\n') <= 3 and c.about.endswith('.') and len(c.about) < 400
    text = (cards.FOLDER/f'{name}.md').read_text()
    assert not PLACES.search(text), PLACES.search(text)[0]
    s = cards.sample_of(c, c.example, root)
    asked, told = kinds(s)
    assert asked == set(c.modalities['in'])
    if told: assert told == set(c.modalities['out'])
    for task in set(c.tasks) & set(NEEDS): assert asked & NEEDS[task], task
    assert ('box' in told) == (c.group == 'grounding') and (('audio' in told) == ('speak' in c.tasks))
    if 'preference' in c.tasks: assert told and (s.rejected or s.label is not None)
    if 'rl' in c.tasks: assert REWARDS & set(s.meta) and not told
    if c.answer: assert told and not s.rejected and not set(s.meta) & REWARDS


@pytest.mark.parametrize('name', NAMES)
def test_missing_column_is_one_line(name):
    "Take a column of the example away: the row is refused by the card's field, unless the card doesn't read it or says that it may be missing."
    c, refused = cards.card(name), []
    whole, optional = cards.to_row(c, c.example), {k for k in c.example if f'{{{k}?' in yaml.safe_dump(c.columns)}
    for column in c.example:
        less = {k: v for k, v in c.example.items() if k != column}
        try: assert column in optional or cards.to_row(c, less) == whole
        except RowError: refused.append(column)
        else: continue
        with pytest.raises(RowError, match=rf'^card {name} columns\.[^\n]*{re.escape(column)}[^\n]*; expected columns as in'): cards.sample_of(c, less)
    assert refused


def test_loaded_and_written(tmp_path, root):
    "From a file, from Parquet, from a folder that 🤗 Datasets wrote: the same samples; written, they are read without a card."
    import datasets
    c = cards.card('scienceqa')
    rows = [{**c.example, 'question': f'Question {i}?'} for i in range(3)]
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    stored = datasets.Dataset.from_list([{**r, 'image': str(root/'a.png')} for r in rows]).cast_column('image', datasets.Image())
    stored.to_parquet(tmp_path/'rows.parquet')
    stored.save_to_disk(tmp_path/'saved')
    text = lambda d: [[(m.role, m.text) for m in s.messages] for s in d]
    first = cards.load('scienceqa', path=tmp_path/'rows.jsonl', root=root)
    for path in 'rows.parquet', 'saved':
        d = cards.load('scienceqa', path=tmp_path/path)
        assert text(d) == text(first) and [len(s.parts) for s in d] == [len(s.parts) for s in first]
        assert cards.load('scienceqa', path=tmp_path/path, rows=2) == d[:2]
    assert text(read(cards.save(d, tmp_path/'out'/'rows.jsonl'))) == text(first)
    assert len(list((tmp_path/'out'/'media').iterdir())) == 1                        # one picture, whatever the number of rows


OFFLINE = "from omnilab.data import cards\ntry: cards.load({name!r}, streaming={streaming})\nexcept ValueError as e: print(e)"

HUB = 'expected a connection to the hub, or path='

def test_a_recipe_names_cards(tmp_path, monkeypatch):
    "Alone, in a mixture, held out, as a stream, to `prepare` and to `eval`: the rows are those that the hub would send, as samples."
    import datasets
    from types import SimpleNamespace
    from omnilab.data import tables
    from omnilab.models.load import load
    from omnilab.train.feed import feed, plan_packs, read_files
    from omnilab.train.prepare import PrepareRecipe, prepare
    from omnilab.train.recipe import Entry, SFTRecipe, build
    from omnilab.train.allowed import check
    known = cards.card('math_instruct')
    rows = [known.example | {'instruction': f'How much is {i} and 1?'} for i in range(6)]
    asked = []
    monkeypatch.setattr(tables, 'hub', lambda address, streaming: asked.append((address, streaming)) or datasets.Dataset.from_list(rows))
    wanted = [cards.sample_of(known, r).messages for r in rows]
    (tmp_path/'own.jsonl').write_text('{"prompt": "Hi", "completion": "Hello"}\n')
    recipe = lambda **d: check(build(SFTRecipe, [Entry(f'data.{k}', v, 'here') for k, v in (d | {'cache': False}).items()] + [Entry('train.steps', 1, 'here')]))
    assert [s.messages for s in read_files(recipe(train='math_instruct', test='math_instruct'))['']] == wanted
    mixed, m = recipe(mixture={'math_instruct': 2, str(tmp_path/'own.jsonl'): 1}), load('omni-tiny')
    packs = plan_packs(read_files(mixed), m, mixed)
    assert list(packs.parts) == ['math_instruct', 'own'] and packs.weights == [2, 1] and sum(p.n_rows for p in packs.handles) == len(rows) + 1
    assert not any(streaming for _, streaming in asked)
    stream = feed(recipe(train='math_instruct', streaming=True), m, None, SimpleNamespace(process_index=0, num_processes=1))
    seen = [r.sample.messages for t in stream.take(1) for r in t.handle.rows]
    assert seen and all(x in wanted for x in seen) and asked[-1] == (cards.address(known), True)
    with pytest.raises(ValueError, match='data.train = .gsm8k.: its rows hold no answer to learn'): recipe(train='gsm8k')
    found = prepare(PrepareRecipe('math_instruct', cache=False))
    assert found.ok and sum(found.kinds.values()) == len(rows)
    from omnilab.train.evaluate import EvalRecipe, read_rows
    assert [s.messages for s in read_rows(EvalRecipe(data='math_instruct', rows=4))] == wanted[:4]


@pytest.mark.parametrize('name, streaming, says', [('gsm8k', False, HUB), ('gsm8k', True, HUB), ('captcha', False, 'known on modelscope only; expected path=')])
def test_offline_is_one_line(name, streaming, says, tmp_path):
    done, _ = run(['-c', OFFLINE.format(name=name, streaming=streaming)], HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'card {name}: ') and says in done.stdout and done.stdout.count('\n') == 1


def test_installed_package_has_them(tmp_path):
    "Built as it is installed: the cards lie where `FOLDER` looks."
    for p in 'pyproject.toml', 'README.md', 'LICENSE': shutil.copy(ROOT/p, tmp_path)
    shutil.copytree(ROOT/'datasets_cards', tmp_path/'datasets_cards')
    (tmp_path/'omnilab').mkdir()
    shutil.copy(ROOT/'omnilab'/'__init__.py', tmp_path/'omnilab')
    code = 'from setuptools import setup; setup()'
    done = subprocess.run([sys.executable, '-c', code, '-q', 'build', '--build-lib', 'site'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.stem for p in (tmp_path/'site'/'datasets_cards').glob('*.md')} == set(NAMES)
    assert cards.FOLDER.name == 'datasets_cards' and (tmp_path/'site'/'omnilab').is_dir()


GOOD = (cards.FOLDER/'squad.md').read_text()

ANSWER = '"{answers.text.0}"'

@pytest.mark.parametrize('old, new', [
    ('id: {huggingface: squad}', 'id: squad'), ('id: {', 'id: {3: x, '), ('split: train', 'split: 3'), ('split: train\n', ''),
    ('split: train', 'split: [train'), ('size: 87599', 'size: many'), ('size: 87599', 'size: null'),
    ('in: [text]', 'in: text'), ('in: [text], ', ''), ('in: [text]', 'in: [smell]'),
    ('tasks: [qa]', 'tasks: qa'), ('tasks: [qa]', 'tasks: []'), ('tasks: [qa]', 'tasks: [fly]'), ('columns:\n', 'columns: {}\nrows:\n'),
    ('  completion:', '  completed:'),
    (ANSWER, '"{answers.text.0|upper}"'), (ANSWER, '"{answers.text.0"'), (ANSWER, '"answers.text.0}"'), (ANSWER, '{each: "{answers.text}"}'),
    (ANSWER, '{map: "{a}", of: 3}'), (ANSWER, '{map: "{a}", to: [3]}'), (ANSWER, '{boxes: "{a}"}'),
    (ANSWER, '{boxes: "{a}", form: [3]}'), (ANSWER, '{boxes: "{a}", form: yxyx}'),
    ('licence:', 'license:'), ('---\nid', 'id'), ('example:', 'example: 3\nmore:'), ('split: train', 'split: train\ntags: last')])
def test_bad_card_is_one_line(old, new):
    assert GOOD.count(old) >= 1
    with pytest.raises(RowError) as e: cards.parse_card(GOOD.replace(old, new, 1), 'squad')
    assert str(e.value).startswith('card squad') and '\n' not in str(e.value) and len(str(e.value)) < 400
