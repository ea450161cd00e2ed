"Options of processors: those of the recipe are in force in training, in what is saved, and in what is loaded again; frames are sampled once."
import json
from dataclasses import replace
from pathlib import Path

import families as f
import numpy as np
import pytest
import torch


def family(name):
    import omnilab, transformers     # noqa: F401 (omnilab first: torchvision)
    model, processor = getattr(f, name)(transformers)
    return f.alive(model), processor


def film(frames=60, fps=12.):
    from omnilab.data.media import Video
    from omnilab.data.samples import Message, Part, Sample
    rng = np.random.default_rng(0)
    clip = Video(np.kron(rng.integers(0, 256, (frames, 4, 4, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8), fps)
    return Sample([Message('user', [Part('video', clip), Part('text', 'what is this ?')]), Message('assistant', 'two of them')])


SAMPLED = [('qwen3_vl', {}), ('qwen3_vl', {'fps': 4}), ('qwen2_5_vl', {'num_frames': 8}), ('qwen2_5_vl', {'fps': 3, 'max_frames': 6}), ('gemma4', {}),
           ('internvl', {'num_frames': 4})]


@pytest.mark.parametrize('name, video', SAMPLED)
def test_frames_are_those_that_the_processor_would_take(name, video):
    "Chosen before decoding, or by the processor from all of them: the same tokens, tensors and positions."
    from omnilab.forest.context import Encoder
    from omnilab.forest.encode import encode
    from omnilab.models.options import configure
    model, processor = family(name)
    processor = configure(processor, video=video)
    early, late = Encoder(processor, model), Encoder(processor, model)
    assert early.picks
    late.picks = None
    (a,), (b,) = encode(film(), early), encode(film(), late)
    assert a.ids.equal(b.ids) and a.media.keys() == b.media.keys() and all(v.equal(b.media[k]) for k, v in a.media.items())
    assert a.positions is b.positions is None or a.positions.equal(b.positions)
    assert len(next(iter(early._media.values())).value) < 60


def test_no_processor_samples_twice():
    "A clip of twice the frames at twice the rate gives as many frames."
    from omnilab.forest.context import Encoder
    from omnilab.forest.encode import encode
    from omnilab.models.options import configure
    model, processor = family('qwen2_5_vl')
    enc = Encoder(configure(processor, video={'fps': 2}), model)
    grid = lambda *how: encode(film(*how), enc)[0].media['video_grid_thw'][0, 0].item()
    assert grid(60, 12.) == grid(120, 24.) == 5


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'gemma4'])
def test_sound_of_clips_only_where_a_family_takes_it(name):
    from omnilab.models.options import OptionError, configure
    with pytest.raises(OptionError, match='media.video.use_audio_in_video: .* has no such option; expected one of'):
        configure(family(name)[1], video={'use_audio_in_video': True})


@pytest.mark.parametrize('name', ['qwen2_5_omni', 'qwen3_omni'])
def test_what_only_a_call_may_say_is_refused(name):
    from omnilab.models.options import OptionError, configure
    with pytest.raises(OptionError, match='media.video.seconds_per_chunk: .* has no such option; expected one of'):
        configure(family(name)[1], video={'seconds_per_chunk': 1.})


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    from omnilab.data.world.write import write
    return write(tmp_path_factory.mktemp('world'), 12, 'train', 0, ['motion', 'ocr'])


def recipe(world, out, **data):
    from omnilab.train.recipe import from_args, SFTRecipe
    r = from_args(SFTRecipe, ['--data.train', str(world), '--train.steps', '2', '--train.device', 'cpu', '--train.tracker', 'none', '--output', str(out),
                              '--media.processor.num_frames', '2', '--data.system', 'Be brief.'])
    return replace(r, data=replace(r.data, **data))


@pytest.fixture(scope='module')
def runs(world, tmp_path_factory):
    "The same run without a cache, with a new one, and with one that has all."
    from omnilab.train.sft import run
    tmp = tmp_path_factory.mktemp('runs')
    return [run(recipe(world, tmp/name, cache=cache)) for name, cache in (('plain', False), ('cold', True), ('warm', True))]


def test_same_run_with_a_cache(runs):
    "To the bit."
    from safetensors.torch import load_file
    metrics = [[{k: v for k, v in json.loads(line).items() if k != 'time'} for line in (r.folder/'metrics.jsonl').read_text().splitlines()] for r in runs]
    assert metrics[0] == metrics[1] == metrics[2]
    weights = [load_file(r.folder/'adapter'/'adapter_model.safetensors') for r in runs]
    for w in weights[1:]: assert w.keys() == weights[0].keys() and all(torch.equal(v, weights[0][k]) for k, v in w.items())


def test_second_run_reads_everything(world, runs):
    from omnilab.data.samples import read
    from omnilab.forest.cache import encode_once
    from omnilab.train.feed import all_as_said
    from omnilab.train.recipe import DataArgs
    rows = encode_once(all_as_said(read(world), DataArgs(system='Be brief.')), runs[0].processor, runs[0].run.model.get_base_model())
    assert rows.misses == 0


def test_options_go_where_the_model_goes(runs):
    "Into the rows, the merged model, and what is loaded for an adapter."
    from omnilab.models.load import load
    from omnilab.train.evaluate import open_model
    from omnilab.train.recipe import ModelArgs
    r = runs[1]
    clips = [row for p in r.packs for row in p.rows if 'video_lengths' in row.media]
    assert clips and all(row.media['video_lengths'].tolist() == [2] for row in clips)
    assert load(r.folder/'model').processor.num_frames == 2
    assert open_model(ModelArgs('omni-tiny'), str(r.folder/'adapter'), 'cpu').processor.num_frames == 2
    assert load('omni-tiny').processor.num_frames == 4
    assert 'num_frames: 2' in (r.folder/'recipe.yaml').read_text() and Path(r.folder/'adapter'/'processor_config.json').is_file()


def test_system_message(runs):
    text = lambda row: runs[1].processor.tokenizer.decode(row.ids)
    assert all(text(row).startswith('<|system|>Be brief.<|end|>') for p in runs[1].packs for row in p.rows)


def test_options_after_packing_are_refused(runs, world, tmp_path):
    from omnilab.train.recipe import RecipeError
    from omnilab.train.sft import run
    with pytest.raises(RecipeError, match='the rows are packed already'): run(recipe(world, tmp_path), packs=runs[0].packs)
