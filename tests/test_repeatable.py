"A seed is a data set, to the byte: in every process, whatever its memory held before."
import hashlib

from conftest import run


def written(folder, noise): # {file: hash of its bytes}
    done, _ = run(['-m', 'omnilab.cli', 'world', '--out', folder, '--n', 300, '--seed', 7], MALLOC_PERTURB_=str(noise), PYTHONHASHSEED=str(noise))
    assert done.returncode == 0, done.stderr
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_same_bytes_in_every_process(tmp_path):
    first, *others = [written(tmp_path/str(noise), noise) for noise in (1, 90, 255)]
    assert {p.rsplit('.')[-1] for p in first} >= {'jsonl', 'png', 'wav', 'mp4'}
    for other in others: assert other == first
