"Encoding on a local Ray: the rows and problems of one process, shards that later runs read, and a worker that is killed."
import pytest
from test_cache import digest, questions, tiny

pytest.importorskip('ray', reason='Ray is not installed: pip install "omnilab[ray]"')

DIE = "import os, pathlib; p = pathlib.Path({!r}); p.exists() and (p.unlink(), os.kill(os.getpid(), 9))"


class Bomb(str):
    "A text that kills the first process which unpickles it."
    def __new__(cls, text, path):
        path.write_text('')
        out = super().__new__(cls, text)
        out.code = DIE.format(str(path))
        return out

    def __reduce__(self): return eval, (f'(exec({self.code!r}), {str(self)!r})[1]',)


@pytest.fixture(scope='module')
def ray():
    "Ray gives its own node 30 seconds to start, which a machine with too much to do doesn't keep."
    from contextlib import ExitStack
    from omnilab.forest.cluster import connected
    with ExitStack() as stack:
        try: cores = stack.enter_context(connected(cores=2))
        except ValueError as e: pytest.skip(f'a local Ray does not start here: {e}')
        yield cores


def test_rows_of_one_process(ray, tmp_path, monkeypatch):
    from omnilab.data.samples import Message, Sample
    from omnilab.forest.cache import Cache, encode_once, inventory
    from omnilab.forest.cluster import by_ray, encode_on_ray
    model, processor = tiny()
    monkeypatch.chdir(tmp_path)                                          # the workers are elsewhere
    samples = questions('images', 12)
    samples.insert(5, Sample([Message('user', 'how many ?'), Message('assistant', '')], origin='rows.jsonl:6'))
    samples[8].origin = Bomb(samples[8].origin, tmp_path/'once')
    once = lambda f, folder, **more: f(samples, processor, model, tmp_path/folder, on_error='skip', **more)
    alone, seen, made = once(encode_once, 'alone'), [], []
    def spread(n, maker, chunks, told):
        by_ray(n, maker, chunks, seen.append)
        made.extend(Cache(maker.writer.folder, maker.writer.encoder).where)
    cold = once(encode_once, 'ray', workers=2, spread=spread)
    assert not (tmp_path/'once').exists()                                # a worker was killed
    assert sum(seen) == len(samples) and len(seen) > 1                   # several chunks, all samples
    assert len(made) == len(samples) - 1                                 # nothing was left to this process but the bad one
    warm = once(encode_on_ray, 'ray')
    assert (cold.misses, warm.misses) == (len(samples), 1)               # the bad one
    assert digest(cold) == digest(warm) == digest(alone) == digest(once(encode_once, 'ray'))
    assert [str(p) for p in cold.problems] == [str(p) for p in warm.problems] == [str(p) for p in alone.problems]
    assert 'rows.jsonl:6' in str(cold.problems[0])
    (there,), (here,) = ([r for r in inventory(tmp_path/f) if r['encoder'] != 'media'] for f in ('ray', 'alone'))
    assert (there['encoder'], there['rows']) == (here['encoder'], here['rows']) and there['shards'] > here['shards']
    assert set(made) == set(Cache(tmp_path/'alone', here['encoder']).where)
    assert not list((tmp_path/'ray').glob('.*'))


def test_ends_with_one_line(ray, tmp_path):
    from omnilab.data.samples import Message, Sample
    from omnilab.forest.cluster import encode_on_ray, results
    from ray.exceptions import WorkerCrashedError
    model, processor = tiny()
    bad = [Sample([Message('user', 'how ?'), Message('assistant', '')], origin='rows.jsonl:9')]
    with pytest.raises(ValueError, match='rows.jsonl:9'): encode_on_ray(bad, processor, model, tmp_path/'ray', 1)
    class Killed: # whose every worker dies, the last one too
        def iter_rows(self): yield {'samples': 1}; raise WorkerCrashedError
    with pytest.raises(ValueError, match='Ray gave up: .*; what is encoded is kept, the same call goes on from there') as e: list(results(Killed()))
    assert '\n' not in str(e.value)


def test_prepare(ray, tmp_path, monkeypatch, capsys):
    "The command: the same words as without, paths that are relative, and problems with their lines."
    from PIL import Image
    from dataclasses import replace
    from omnilab.forest import cache
    from omnilab.settings import settings
    from omnilab.train.prepare import main
    Image.new('RGB', (48, 48), 'red').save(tmp_path/'red.png')
    row = '{{"prompt": "<image>How much is {0} and 1?", "completion": "{0}1", "images": ["red.png"]}}\n'
    (tmp_path/'rows.jsonl').write_text(''.join(map(row.format, range(6))) + '{"prompt": "Hi", "completion": " "}\n')
    monkeypatch.chdir(tmp_path)
    said = {}
    for name, words in dict(alone=[], ray=['--ray', '--workers', '2'], again=['--ray']).items():
        kept = tmp_path/('alone' if name == 'alone' else 'ray')
        monkeypatch.setattr(cache, 'settings', replace(settings, paths=replace(settings.paths, cache=kept)))
        with pytest.raises(SystemExit) as e: main(['--data', 'rows.jsonl', *words])
        assert e.value.code == 1
        said[name] = capsys.readouterr().out
    assert said['alone'] == said['ray'] and 'rows.jsonl:7' in said['ray'] and '6 samples encoded, 0 read' in said['ray']
    assert '0 samples encoded, 6 read' in said['again']
