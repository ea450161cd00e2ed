"A model in four bits under adapters: trained, saved whole in its own precision, and refused where its weights would have to move."
import json

from conftest import run


def sft(folder, *words):
    rows = folder/'rows.jsonl'
    if not rows.exists():
        asked = [{'messages': [{'role': 'user', 'content': f'Say {i}.'}, {'role': 'assistant', 'content': str(i)}]} for i in range(8)]
        rows.write_text(''.join(json.dumps(r) + '\n' for r in asked))
    words = ['sft', '--data.train', rows, '--model.dtype', 'float32', '--train.device', 'cpu', '--train.steps', 3, *words]
    return run(['-m', 'omnilab.cli', *words])[0]


def losses(out): return [json.loads(line)['loss'] for line in (out/'metrics.jsonl').open()]


def test_four_bits(tmp_path):
    for kind in ('none', 'nf4'):
        done = sft(tmp_path, '--model.quantize', kind, '--output', tmp_path/kind)
        assert done.returncode == 0, done.stderr[-2000:]
    whole, small = losses(tmp_path/'none'), losses(tmp_path/'nf4')
    assert whole != small and abs(whole[0] - small[0]) < .2 * whole[0]
    assert 'quantization_config' not in json.loads((tmp_path/'nf4'/'model'/'config.json').read_text())
    assert (tmp_path/'nf4'/'model'/'model.safetensors').stat().st_size == (tmp_path/'none'/'model'/'model.safetensors').stat().st_size


def test_refused(tmp_path):
    done = sft(tmp_path, '--model.quantize', 'nf4', '--adapter.kind', 'none', '--output', tmp_path/'out')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'quantised weights cannot move; expected an adapter' in done.stderr
