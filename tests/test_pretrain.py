"""The command that made the shipped checkpoint: two processes, from an empty folder to a scored model; killed, it goes on as if nothing had been."""
import json, os, shutil, subprocess, sys
import pytest

SMALL = ('--size.hidden 64 --size.layers 1 --size.vision 32 --size.vision_layers 1 --size.audio 32 '
         '--image_codes 64 --audio_codes 16 --warm 3 --polish.rounds 1 --polish.steps 2 --score 1')


def pretrain(out, steps):
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    words = f'--output {out} --train.steps {steps} --train.save_every 2 {SMALL}'.split()
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'omnilab.train.pretrain', *words]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (out/'metrics.jsonl').open()]


@pytest.mark.slow
def test_from_an_empty_folder(tmp_path):
    out = tmp_path/'run'
    rows = pretrain(out, 3)
    assert [r['step'] for r in rows] == [1, 2, 3]
    about = json.loads((out/'model'/'scores.json').read_text())
    assert about['processes'] == 2 and about['steps'] == 3 + 2 and {'test', 'novel'} == {*about['scores']}
    assert (out/'model'/'model.safetensors').exists()
    weights = (out/'model'/'model.safetensors').read_bytes()
    for name in ('model', 'model-0', 'polish-1', 'checkpoints/step-000003'): shutil.rmtree(out/name)
    again = pretrain(out, 3)                                              # from step 2
    assert [r['step'] for r in again] == [1, 2, 3] and again[2]['loss'] == rows[2]['loss']
    assert (out/'model'/'model.safetensors').read_bytes() == weights
