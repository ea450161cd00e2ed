"""Clips that are heard and seen at once (use_audio_in_video): the tokens and places of the family's own code, in training as in generation."""
import families as f
import numpy as np
import pytest
import torch

FAMILIES = ['qwen2_5_omni', 'qwen3_omni']
RATE = 16_000


def clip(seconds=1.8, frames=24, fps=8., seed=0, sound=True):
    from omnilab.data.media import Audio, Video
    rng = np.random.default_rng(seed)
    wave = Audio(rng.uniform(-.3, .3, int(seconds * 22_050)).astype(np.float32), 22_050)
    return Video(rng.integers(0, 256, (frames, 56, 56, 3)).astype(np.uint8), fps, wave if sound else None)


def talk(parts, answer='two of them', text='what is this ?'):
    from omnilab.data.samples import Message, Part, Sample
    return Sample([Message('user', [*(Part(*p) for p in parts), Part('text', text)]), Message('assistant', answer)], origin='d.jsonl:1')


@pytest.fixture(scope='module', params=FAMILIES)
def case(request):
    import omnilab, transformers     # noqa: F401 (omnilab first: torchvision)
    from omnilab.forest.context import Encoder
    from omnilab.models.options import configure
    torch.manual_seed(0)
    model, processor = getattr(f, request.param)(transformers)
    processor = configure(processor, video=dict(use_audio_in_video=True))
    return f.alive(model), processor, Encoder(processor, model)


def asked(processor, video):
    "The processor's own call, as its class documents it: the clip sampled at two frames a second, its sound at 16 kHz."
    from omnilab.data.audio import resample
    from omnilab.models.options import frame_picker
    index = frame_picker(processor)(len(video.frames), video.fps)
    text = '<user> <|vision_bos|><|VIDEO|><|vision_eos|> what is this ? <end> <assistant> '
    meta = dict(total_num_frames=len(video.frames), fps=video.fps, duration=video.seconds, frames_indices=index, height=56, width=56)
    return processor(text=[text], videos=[[video.frames[index]]], audio=[resample(video.audio, RATE).wave], video_metadata=[[meta]], do_sample_frames=False,
                     use_audio_in_video=True, fps=2, sampling_rate=RATE, return_tensors='pt')


def runs(ids, marks):
    "Stretches of sound and sight, in the order of the tokens."
    kinds = [marks[t] for t in ids if t in marks]
    return [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]


def test_the_tokens_and_tensors_of_its_own_code(case):
    from omnilab.forest.encode import encode
    model, processor, enc = case
    row, = encode(talk([('video', clip())]), enc)
    want, n = asked(processor, clip()), int((~row.target).sum())
    assert row.ids[:n].equal(want['input_ids'][0])
    for k in set(want) - {'input_ids', 'attention_mask'}: assert torch.as_tensor(want[k]).equal(row.media[k]), k
    assert runs(row.ids.tolist(), enc.placeholders)[:2] == ['video', 'audio'] and len(row.media_keys) == 1


def test_sound_and_sight_take_turns():
    "A long clip: seconds of both alternate, and both take the same time."
    import transformers
    from omnilab.forest.context import Encoder
    from omnilab.forest.encode import encode
    from omnilab.models.options import configure
    for name in FAMILIES:
        torch.manual_seed(0)
        tok = f.tokenizer(f.OMNI)
        kind, patch = ('Qwen2_5Omni', 14) if name == 'qwen2_5_omni' else ('Qwen3OmniMoe', 16)
        long = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=30)
        processor = getattr(transformers, f'{kind}Processor')(*f.eyes(transformers, patch), long, tok, chat_template=f.template(**f.HEARD))
        model = f.alive(getattr(f, name)(transformers)[0])
        enc = Encoder(configure(processor, video=dict(use_audio_in_video=True)), model)
        row, = encode(talk([('video', clip(6., 48, 8.))]), enc)
        assert len(runs(row.ids.tolist(), enc.placeholders)) >= 5
        time = {k: row.positions[0][[enc.placeholders.get(t) == k for t in row.ids.tolist()]] for k in ('audio', 'video')}
        assert time['audio'].min() == time['video'].min() and abs(int(time['audio'].max()) - int(time['video'].max())) <= 50      # one grid of a clip


def test_places_and_logits_are_the_models_own(case):
    "A plain forward that finds places itself, told of the sound, against our row in a forest."
    from omnilab.forest.encode import encode
    model, processor, enc = case
    row, = encode(talk([('video', clip())]), enc)
    inputs = dict(input_ids=row.ids[None], attention_mask=torch.ones_like(row.ids[None]), use_cache=False, **row.media)
    with torch.no_grad():
        own = model(**inputs, use_audio_in_video=True).logits[0]
        ours = model(input_ids=row.ids[None], position_ids=row.positions[:, None], use_cache=False, **row.media).logits[0]
        deaf = model(input_ids=row.ids[None], position_ids=row.positions[:, None] * 0 + torch.arange(len(row)), use_cache=False, **row.media).logits[0]
    assert (own - ours).abs().max() <= 1e-5 * own.abs().max() < (own - deaf).abs().max()


def test_forest_is_its_rows(case):
    "Two questions on one clip share it; logits and gradients of separate rows."
    from omnilab.forest.bins import collate
    from omnilab.forest.encode import encode
    from omnilab.forest.tree import forest
    from omnilab.objectives.score import Scorer
    model, processor, enc = case
    film = clip()
    samples = [talk([('video', film)]), talk([('video', film)], 'one', 'how many are there ?'), talk([('video', clip(1., 16, seed=1)), ('audio', film.audio)])]
    rows = [r for s in samples for r in encode(s, enc)]
    assert len(forest(rows)) == 2 and len(forest(rows)[0]) < sum(map(len, rows[:2]))
    scorer = Scorer(model).train()
    def step(packs):
        scorer.zero_grad()
        got = [scorer(p) for p in packs]
        sum(s.logp.sum() for s in got).backward()
        return sum(s.logp.detach().sum() for s in got), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    (one, grads), (many, grads_too) = step([collate(forest(rows))]), step([collate(forest([r])) for r in rows])
    assert abs(one - many) <= 1e-5 * abs(many) and any('audio_tower' in n for n in grads) and any('visual' in n for n in grads)
    for n in grads_too: assert (grads[n] - grads_too[n]).abs().max() <= 1e-4 * (1e-3 + grads_too[n].abs().max()), n


def test_generation_reads_the_same(case):
    "The engine's greedy answer, of a batch of different prompts, is that of the class's own call."
    from omnilab.data.samples import Message, Part
    from omnilab.engine.local import LocalEngine
    from omnilab.engine.protocol import Request
    model, processor, enc = case
    want = asked(processor, clip())
    with torch.no_grad(): ids = model.generate(**want, use_audio_in_video=True, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    ask = lambda *parts: Request([Message('user', [*parts, Part('text', 'what is this ?')])], max_new_tokens=6, temperature=0)
    engine = LocalEngine(model, processor)
    engine.stops = set()
    got = engine.generate([ask(Part('video', clip())), ask()])
    assert got[0].token_ids == ids[0, want['input_ids'].shape[1]:].tolist() and len(got[1].token_ids) == 6


def test_a_clip_without_sound_is_one_line(case):
    from omnilab.forest.encode import encode
    from omnilab.forest.template import EncodeError
    *_, enc = case
    with pytest.raises(EncodeError, match=r'd.jsonl:1 messages\[1\]: MediaError: .*no sound in it; expected a clip with a sound track, since use_audio'):
        encode(talk([('video', clip(sound=False))]), enc)


def test_a_sound_longer_than_the_window_is_refused(case):
    "Qwen2.5's extractor cuts it; Qwen3's hears it whole."
    from omnilab.forest.encode import encode
    from omnilab.forest.template import EncodeError
    *_, enc = case
    if 'Qwen3' in type(enc.processor).__name__:
        short, long = (encode(talk([('video', clip(n))]), enc)[0] for n in (1.8, 2.5))
        assert long.media['feature_attention_mask'].sum() == 250 > short.media['feature_attention_mask'].sum()
        return
    with pytest.raises(EncodeError, match=r'd.jsonl:1 messages\[1\]: a sound of 2.5 s, whose end .* leaves out'): encode(talk([('video', clip(2.5))]), enc)


def test_from_a_file_and_in_lengths(case, tmp_path):
    "The sound track of a film; how long it is its packets tell, so that nothing is decoded."
    from omnilab.data.media import save_video
    from omnilab.forest.encode import encode
    from omnilab.forest.lengths import lengths
    model, processor, enc = case
    save_video(clip(), tmp_path/'a.mp4')
    sample = talk([('video', str(tmp_path/'a.mp4'))])
    row, = encode(sample, enc)
    assert {'audio', 'video'} == set(runs(row.ids.tolist(), enc.placeholders))
    found = lengths([sample], processor, model)
    assert not found.decoded and found.rows[0].ids.equal(row.ids)


def test_check_passes(case):
    from omnilab.train.check import check
    model, processor, _ = case
    report = check(model, processor, 'told')
    assert report.ok, '\n'.join(str(x.cells()) for x in report.findings if not x.ok)
