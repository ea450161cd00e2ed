"""The demo, small: two runs with one seed are the same run, and what it wrote can be used by the other commands."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}


def omnilab(*words):
    done = subprocess.run([sys.executable, '-m', 'omnilab.cli', *map(str, words)], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def steps(run:Path):
    records = [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != 'time'} for r in records]


@pytest.fixture(scope='module')
def demos(tmp_path_factory):
    homes = [tmp_path_factory.mktemp('demo')/'run' for _ in range(2)]
    said = [omnilab('demo', '--output', h, '--epochs', 1, '--rows', .006) for h in homes]
    return homes, said


def test_one_seed_one_run(demos):
    (a, b), _ = demos
    assert len(steps(a)) > 2 and steps(a) == steps(b)
    for name in ('scores-before.json', 'scores-after.json'):
        assert json.loads((a/name).read_text())['tasks'] == json.loads((b/name).read_text())['tasks']
    for name in ('adapter/adapter_model.safetensors', 'model/model.safetensors'): assert (a/name).read_bytes() == (b/name).read_bytes()


def test_report_and_verdict(demos):
    (a, _), (said, _) = demos
    assert 'new tasks:' in said and 'known tasks:' in said
    page = (a/'report.html').read_text()
    for piece in ('Learned, and not forgotten', 'Saved, loaded back, asked', 'data:image/png;base64', 'data:audio/wav;base64', '<svg'): assert piece in page
    assert 'src="http' not in page and 'url(http' not in page             # one file, no network


def test_what_it_wrote_is_used_by_others(demos):
    (a, _), _ = demos
    image = next((a/'data'/'media').glob('*scene*.png'))
    whole = omnilab('infer', a/'model', '--text', 'How many shapes are there?', '--image', image)
    adapted = omnilab('infer', '--model.name', 'omni-tiny', '--adapter', a/'adapter', '--text', 'How many shapes are there?', '--image', image)
    assert whole == adapted and whole.strip()
