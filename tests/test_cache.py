"The cache of encoded rows: killed, crowded, full, broken and changed, it gives what encoding gives, or nothing."
import functools, hashlib, os, random, resource, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path

import families as f
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def tiny():
    "Model and processor of a small Qwen2.5-VL."
    import omnilab, transformers     # noqa: F401 (omnilab first: torchvision)
    model, processor = f.qwen2_5_vl(transformers)
    return f.alive(model), processor


def questions(folder, n=24):
    "Samples, every third on the image of the one before."
    from PIL import Image
    from omnilab.data.samples import Message, Part, Sample
    rng, out, folder = np.random.default_rng(0), [], Path(folder)
    folder.mkdir(exist_ok=True)
    for i in range(n):
        path = folder/f'{i - (i % 3 == 2)}.png'
        if not path.exists(): Image.fromarray(np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((9, 9, 1))).astype(np.uint8)).save(path)
        seen = [Part('image', str(path))] if i % 4 else []
        out.append(Sample([Message('user', [*seen, Part('text', f'how many are there ? {"one " * (i % 5)}')]), Message('assistant', 'two of them ' * (1 + i))],
                          origin=f'rows:{i}'))
    return out


def digest(rows): # of everything that a model sees
    h = hashlib.sha256()
    for r in rows:
        tensors = dict(ids=r.ids, target=r.target, positions=r.positions, **r.extras, **{f'media {k}': v for k, v in r.media.items()})
        for k, v in tensors.items(): h.update(f'{k} {v if v is None else (v.dtype, tuple(v.shape))}'.encode() + (b'' if v is None else v.numpy().tobytes()))
        h.update(repr((r.media_keys, r.media_end, r.sample.origin)).encode())
    return h.hexdigest()


@pytest.fixture(scope='module')
def qwen(): return tiny()


@pytest.fixture(scope='module')
def data(tmp_path_factory, qwen):
    from omnilab.forest.encode import encode_all
    samples = questions(tmp_path_factory.mktemp('images'))
    return samples, digest(encode_all(samples, qwen[1], qwen[0])[0])


def once(qwen, samples, folder, **more):
    from omnilab.forest.cache import encode_once
    return encode_once(samples, qwen[1], qwen[0], folder, **more)


# --- killed, and crowded

def forked(job): # a process that does it and ends
    pid = os.fork()
    if pid: return pid
    try: job(); os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr, flush=True); os._exit(3)


def ended(pid): return os.waitpid(pid, 0)[1]


def killing(folder):
    "Kill a writer at many moments; after each, what is there is whole and right, and the rest is encoded."
    from omnilab.forest import cache, shards
    from omnilab.forest.encode import encode_all
    warnings.simplefilter('error')
    qwen, folder = tiny(), Path(folder)
    samples = questions(folder/'images', 60)
    wanted = [digest(encode_all([s], qwen[1], qwen[0])[0]) for s in samples]
    cache.Writer = functools.partial(cache.Writer, samples=2)
    began = time.monotonic(); once(qwen, samples, folder/'a'); whole, at = time.monotonic() - began, random.Random(0)
    some = []
    for i in range(14):
        if i % 7 == 0: shutil.rmtree(folder/'b', ignore_errors=True)
        def write():
            if i % 7 == 6: os.fsync = lambda f: os.kill(os.getpid(), signal.SIGKILL)       # its file is written and has no name yet
            once(qwen, samples, folder/'b')
        if i % 7 == 6: [p.unlink() for p in list((folder/'b').glob('[!.m]*-*'))[:1]]       # however fast the others were, something is left to write
        pid = forked(write)
        if i % 7 != 6: time.sleep(at.random() * whole / 3); os.kill(pid, signal.SIGKILL)
        ended(pid)
        assert cache.verify(folder/'b')[1] == []
        there = cache.Cache(folder/'b', next((folder/'a').glob('[!m]*-*')).name.partition('-')[0]).where
        some.append(len(there))
    left = len(list((folder/'b').glob('.*.part')))
    assert left
    rest = once(qwen, samples, folder/'b')
    assert rest.hits == some[-1] and [digest(rest[i:i + 1]) for i in range(len(rest))] == wanted
    again = once(qwen, samples, folder/'b')
    assert again.misses == 0 and [digest(again[i:i + 1]) for i in range(len(again))] == wanted
    shards.STALE = 0.
    assert shards.sweep(folder/'b') == left and not list((folder/'b').glob('.*'))
    print('there after each kill', some, 'left', left)


def crowding(folder):
    "Four writers of the same and of overlapping samples at once."
    from omnilab.forest import cache
    from omnilab.forest.encode import encode_all
    warnings.simplefilter('error')
    qwen, folder = tiny(), Path(folder)
    samples = questions(folder/'images', 40)
    cache.Writer = functools.partial(cache.Writer, samples=2)
    jobs = [forked(lambda part=part: once(qwen, part, folder/'c')) for part in (samples, samples, samples[10:], samples[:25])]
    assert [ended(p) for p in jobs] == [0] * 4
    got = once(qwen, samples, folder/'c')
    assert got.misses == 0 and digest(got) == digest(encode_all(samples, qwen[1], qwen[0])[0])
    assert cache.verify(folder/'c')[1] == []


def script(name, *args, **env):
    path = os.pathsep.join([str(ROOT), str(ROOT/'tests')])
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **env}
    return subprocess.run([sys.executable, '-u', __file__, name, *map(str, args)], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize('name', ['killing', 'crowding'])
def test_writers(name, tmp_path):
    done = script(name, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


# --- full

def filled(qwen, data, folder, **more): # with room for some shards only, which is taken by them
    from omnilab.forest import cache
    samples, wanted = data
    kept = cache.Writer
    cache.Writer = functools.partial(kept, samples=4)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            return once(qwen, samples, folder, **more), [str(w.message) for w in said]
    finally: cache.Writer = kept


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path/'small'
    where.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=96k', 'tmpfs', where], capture_output=True, text=True) if shutil.which('mount') else None
    if done is None or done.returncode: pytest.skip('no small disk can be mounted here')
    yield where
    subprocess.run(['umount', where], check=True)


def test_full_disk(qwen, data, small_disk):
    from omnilab.forest.cache import verify
    got, said = filled(qwen, data, small_disk/'cache')
    assert said == [f'cache {small_disk/"cache"}: cannot be written (No space left on device); what it holds stays valid, the rows of this run stay in memory']
    assert digest(got) == data[1]
    whole, broken = verify(small_disk/'cache')
    assert whole and not broken and not list((small_disk/'cache').glob('.*'))
    again, _ = filled(qwen, data, small_disk/'cache')
    assert 0 < again.hits < len(data[0]) and digest(again) == data[1]
    with pytest.raises(OSError, match='cannot be written'): filled(qwen, data, small_disk/'cache', full='raise')


def test_file_size_limit(qwen, data, tmp_path):
    "Where no small disk can be mounted: a limit on the size of files."
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, old[1]))
    try: got, said = filled(qwen, data, tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old); signal.signal(signal.SIGXFSZ, handler)
    assert len(said) == 1 and 'File too large' in said[0]
    assert digest(got) == data[1] and not list(tmp_path.glob('.*'))


# --- broken

def test_no_bit_passes(qwen, data, tmp_path):
    "Any byte of a shard changed: refused when it is opened or read, or the rows are the same."
    from omnilab.forest.shards import BrokenShard, Shard
    wanted = once(qwen, data[0], tmp_path/'a')
    path, = [p for p in (tmp_path/'a').iterdir() if not p.name.startswith('media')]
    good, at, found = path.read_bytes(), random.Random(0), 0
    whole = [digest([r]) for r in wanted]
    head = 8 + int.from_bytes(good[:8], 'little')
    for n in [*at.sample(range(head), 150), *at.sample(range(head, len(good)), 150)]:
        (bad := tmp_path/'bad.safetensors').write_bytes(good[:n] + bytes([good[n] ^ (1 << at.randrange(8))]) + good[n + 1:])
        try: s = Shard(bad)
        except BrokenShard as e:
            found += 1
            assert '\n' not in str(e)
            continue
        where = dict(zip(s.keys, s.first))
        for i, r in enumerate(wanted):
            j = where[wanted.found[i][0].keys[wanted.found[i][1]]]
            try: assert digest([s.row(j, r.sample)]) == whole[i], n
            except BrokenShard: found += 1; break
    assert found > 200      # the rest: padding, and what is for people


# --- changed

CHANGES = {
    'an option of the processor': lambda m, p: setattr(p.image_processor, 'image_mean', [.5, .5, .5]),
    'its size of images': lambda m, p: setattr(p.image_processor, 'size', dict(shortest_edge=28 * 28, longest_edge=2 * 28 * 28)),
    'the template': lambda m, p: setattr(p, 'chat_template', p.chat_template.replace('<{{ m.role }}>', '{{ m.role }} <{{ m.role }}>')),
    'the vocabulary': lambda m, p: p.tokenizer.add_tokens(['one one']),
    'what ends an answer': lambda m, p: setattr(m.generation_config, 'eos_token_id', [1, 7]),
    'what stands for media': lambda m, p: setattr(m.config, 'audio_token_id', 9),
    "the model's positions": lambda m, p: setattr(m.model.config.vision_config, 'spatial_merge_size', 1),
    'the type of its weights': lambda m, p: m.bfloat16(),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_change_is_a_miss(change, data, tmp_path):
    from omnilab.forest.encode import encode_all
    model, processor = tiny()
    samples = [s for s in data[0] if s.parts[0].type == 'image'][:4]
    once((model, processor), samples, tmp_path)
    assert once((model, processor), samples, tmp_path).misses == 0
    change(model, processor)
    skip = dict(on_error='skip')           # another merge size counts fewer tokens than there are
    got = once((model, processor), samples, tmp_path, **skip)
    rows, problems = encode_all(samples, processor, model, **skip)
    assert got.misses == 4 and [str(p) for p in got.problems] == [str(p) for p in problems]
    if model.dtype == torch.float32: assert digest(got) == digest(rows)


def test_another_version_is_a_miss(qwen, data, tmp_path, monkeypatch):
    from omnilab.forest import cache, template
    assert [once(qwen, data[0], tmp_path).misses for _ in range(2)] == [len(data[0]), 0]
    real = cache.installed
    monkeypatch.setattr(cache, 'installed', lambda name: '5.99' if name == 'transformers' else real(name))
    assert once(qwen, data[0], tmp_path).misses == len(data[0])
    monkeypatch.undo()
    assert once(qwen, data[0], tmp_path).misses == 0
    other = tmp_path/'template.py'
    other.write_text(Path(template.__file__).read_text() + '\n# changed\n')
    monkeypatch.setattr(template, '__file__', str(other))           # the code itself
    assert once(qwen, data[0], tmp_path).misses == len(data[0])


def test_other_bytes_are_a_miss(qwen, tmp_path):
    samples = questions(tmp_path/'images', 9)
    once(qwen, samples, tmp_path/'cache')
    path = next(p.value for s in samples for p in s.parts if p.type == 'image')
    where = [s for s in samples if any(p.value == path for p in s.parts)]
    stat, data = os.stat(path), Path(questions(tmp_path/'others', 9)[1].parts[0].value).read_bytes()
    from PIL import Image
    Image.open(path).transpose(Image.FLIP_LEFT_RIGHT).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert once(qwen, samples, tmp_path/'cache').misses == len(where) and data
    shutil.move(tmp_path/'images', tmp_path/'moved')
    assert once(qwen, questions(tmp_path/'images', 9), tmp_path/'cache').misses == 0       # the first bytes, in new files


# --- many processes

@pytest.mark.parametrize('workers', [1, 2])
def test_same_rows_from_workers(workers, qwen, data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = once(qwen, data[0], tmp_path, workers=workers)
    assert got.misses == len(data[0]) and digest(got) == data[1]
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith('media')]) > 1       # chunks
    again = once(qwen, data[0], tmp_path)
    assert again.misses == 0 and digest(again) == data[1]


class Bomb:
    "Ends the process that receives it."
    def __reduce__(self): return os._exit, (9,)


def test_a_dead_worker_costs_no_row(qwen, data, tmp_path):
    from dataclasses import replace
    samples = [replace(s, meta={'bomb': Bomb()}) if i == 20 else s for i, s in enumerate(data[0])]
    with pytest.warns(UserWarning, match='a process that encodes ended'): got = once(qwen, samples, tmp_path, workers=1)
    assert digest(got) == data[1]


def test_bad_samples_and_workers(qwen, data, tmp_path):
    from omnilab.data.samples import Message, Part, Sample
    from omnilab.forest.template import EncodeError
    lost = Sample([Message('user', [Part('image', str(tmp_path/'none.png'))]), Message('assistant', 'two')], origin='rows:lost')
    samples = [*data[0][:6], lost, *data[0][6:]]
    with pytest.raises(EncodeError, match='rows:lost.*No such file'): once(qwen, samples, tmp_path/'a', workers=1)
    got = once(qwen, samples, tmp_path/'b', workers=1, on_error='skip')
    assert digest(got) == data[1] and [p.origin for p in got.problems] == ['rows:lost'] and len(got) == len(data[0])


def orphans(folder):
    "Encode without end, in two processes."
    samples = questions(Path(folder)/'images', 30)
    from dataclasses import replace
    many = [replace(s, template={'n': i}) for i in range(300) for s in samples]
    qwen = tiny()
    qwen[1].chat_template += '{# n #}{{ "" if n is none }}'
    once(qwen, many, Path(folder)/'cache', workers=2)


def test_workers_end_with_their_master(tmp_path):
    import psutil
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests')]), 'OMP_NUM_THREADS': '1'}
    p = psutil.Popen([sys.executable, __file__, 'orphans', str(tmp_path)], env=env)
    end, kids = time.monotonic() + 120, []
    while time.monotonic() < end and p.poll() is None and not list((tmp_path/'cache').glob('[!m]*-*.safetensors')): time.sleep(.1)
    kids = p.children(recursive=True)
    p.kill(); p.wait()
    assert len(kids) >= 2
    _, alive = psutil.wait_procs(kids, timeout=30)
    assert not alive


def ranks(folder):
    import torch.distributed as dist
    from omnilab.forest import cache
    dist.init_process_group('gloo')
    qwen, folder, said = tiny(), Path(folder), []
    count = lambda self, *a, make=cache.Maker.make: (said.append(len(a[0])), make(self, *a))[1]
    cache.Maker.make = count
    samples = questions(folder/'images')
    got = once(qwen, samples, folder/'cache')
    again = once(qwen, samples, folder/'cache')
    (folder/f'rank{dist.get_rank()}').write_text(f'{digest(got)} {digest(again)} {got.misses} {again.misses} {sum(said)}')


def test_same_rows_from_ranks(data, tmp_path):
    questions(tmp_path/'images')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests')]), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, 'ranks', str(tmp_path)]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    a, b = [(tmp_path/f'rank{i}').read_text().split() for i in range(2)]
    n = len(data[0])
    assert a[:4] == b[:4] == [data[1], data[1], str(n), '0']
    assert int(a[4]) + int(b[4]) == n and 0 < int(a[4]) < n       # each encoded its share


# --- every family

FAMILIES = '''qwen2_5_vl qwen3_vl gemma3 gemma4 llava_onevision internvl idefics3 janus qwen2_audio qwen2_5_omni qwen3_omni minicpm_v llama4'''.split()


@pytest.mark.parametrize('name', FAMILIES)
def test_every_family(name, tmp_path):
    "Its rows come back to the bit, and the facts about its model are enough to make them."
    import omnilab, transformers     # noqa: F401
    from omnilab.forest.cache import Facts
    from omnilab.forest.encode import encode_all
    from omnilab.models.load import capabilities
    from omnilab.train.check import probes
    model, processor = getattr(f, name)(transformers)
    f.alive(model)
    samples = probes(capabilities(model)['in'], ())
    rows, problems = encode_all(samples, processor, model, 'skip')
    assert any(r.media for r in rows)
    few, _ = encode_all(samples, processor, Facts.of(model), 'skip')
    got = [once((model, processor), samples, tmp_path, on_error='skip') for _ in range(2)]
    assert digest(few) == digest(got[0]) == digest(got[1]) == digest(rows)
    assert got[1].misses == len(problems)


if __name__ == '__main__': globals()[sys.argv[1]](*sys.argv[2:])
