"""Published families as twins of their own configurations, and processors of the very same classes over a tiny vocabulary. Shared by tests."""
import json
from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory

WORDS = '<pad> <end> <user> <assistant> <unk> how many are there ? what is this here two one of them look at the following and say :'.split()
TEXT = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
QWEN = dict(image_token='<|image_pad|>', video_token='<|video_pad|>', vision_start_token='<|vision_start|>', vision_end_token='<|vision_end|>')
SEEN = dict(image='<|vision_start|><|image_pad|><|vision_end|>', video='<|vision_start|><|video_pad|><|vision_end|>')
OMNI = dict(image_token='<|IMAGE|>', video_token='<|VIDEO|>', audio_token='<|AUDIO|>', vision_bos_token='<|vision_bos|>', vision_eos_token='<|vision_eos|>',
            audio_bos_token='<|audio_bos|>', audio_eos_token='<|audio_eos|>')
HEARD = dict(image='<|vision_bos|><|IMAGE|><|vision_eos|>', video='<|vision_bos|><|VIDEO|><|vision_eos|>', audio='<|audio_bos|><|AUDIO|><|audio_eos|>')
SIDE = dict(height=32, width=32)


def tokenizer(named, *more):
    """Words, and the special tokens that a family knows by name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, *named.values(), *more])}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='<end>', unk_token='<unk>', extra_special_tokens=named)
    tok.add_special_tokens({'extra_special_tokens': [*named.values(), *more]})
    return tok


def template(**media):
    """A chat template that writes `media[kind]` for a medium."""
    cases = ''.join(f"{{% elif p.type == '{kind}' %}}{text} " for kind, text in media.items())
    return ("{% for m in messages %}<{{ m.role }}> {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }} " + cases + "{% endif %}{% endfor %}<end> "
            "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}")


def ids(tok, named): return {f'{k}_id': tok.convert_tokens_to_ids(v) for k, v in named.items()}


def words(tok, **more): return TEXT | dict(vocab_size=len(tok)) | more


def rope(*sections): return dict(rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=sections))


def small(config):
    from omnilab.models.twin import twin
    return twin(config)


def alive(model, stop=1):
    """Ready for `check`: it stops at the tokenizer's stop token."""
    import omnilab.forest.attention     # noqa: F401 (registers 'forest')
    model.generation_config.eos_token_id = stop
    model.set_attn_implementation('forest')
    return model.eval()


def eyes(t, patch, video='Qwen2VLVideoProcessor'):
    """Image and video processors of the Qwen families: at most 4 × 4 patches a picture."""
    least, most = (2 * patch)**2, (4 * patch)**2
    images = t.Qwen2VLImageProcessor(patch_size=patch, min_pixels=least, max_pixels=most)
    return images, getattr(t, video)(patch_size=patch, size=dict(shortest_edge=least, longest_edge=4 * most))


def qwen_vl(t, name, patch, text, vision=None, video='Qwen2VLVideoProcessor', processor=None):
    """Qwen2.5-VL, Qwen3-VL and Qwen3.5 differ in their layers only."""
    tok, (images, videos) = tokenizer(QWEN), eyes(t, patch, video)
    proc = getattr(t, processor or f'{name}Processor')(images, tok, videos, chat_template=template(**SEEN))
    return small(getattr(t, f'{name}Config')(text_config=words(tok, **text), vision_config=dict(patch_size=patch) | (vision or {}), **ids(tok, QWEN))), proc


def qwen2_5_vl(t): return qwen_vl(t, 'Qwen2_5_VL', 14, rope(16, 24, 24), dict(window_size=28))


def qwen3_vl(t): return qwen_vl(t, 'Qwen3VL', 16, rope(24, 20, 20), None, 'Qwen3VLVideoProcessor')


def qwen3_5(t): return qwen_vl(t, 'Qwen3_5', 16, {}, None, 'Qwen3VLVideoProcessor', 'Qwen3VLProcessor')


def gemma3(t, tokens=4):
    named = dict(boi_token='<start_of_image>', eoi_token='<end_of_image>', image_token='<image_soft_token>')
    tok = tokenizer(named)
    proc = t.Gemma3Processor(t.Gemma3ImageProcessor(size=SIDE), tok, chat_template=template(image='<start_of_image>'), image_seq_length=tokens)
    vision = dict(image_size=32, patch_size=4, vision_use_head=False)
    return small(t.Gemma3Config(text_config=words(tok), vision_config=vision, mm_tokens_per_image=tokens,
        boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id, image_token_index=tok.image_token_id)), proc


def gemma3_long(t): return gemma3(t, 16)


def gemma3n(t):
    """A small tower of timm's stands in for the published one, whose sizes no configuration tells. Ids of media lie behind those of the text."""
    named = dict(boi_token='<start_of_image>', boa_token='<start_of_audio>', eoi_token='<end_of_image>', image_token='<image_soft_token>',
                 eoa_token='<end_of_audio>', audio_token='<audio_soft_token>')
    tok = tokenizer(named)
    proc = t.Gemma3nProcessor(t.Gemma3nAudioFeatureExtractor(), t.SiglipImageProcessor(size=dict(height=64, width=64)), tok,
                              template(image='<image_soft_token>', audio='<audio_soft_token>'), image_seq_length=4)
    vision, audio = dict(vocab_offset=tok.eoi_token_id, vocab_size=2), dict(vocab_offset=tok.eoa_token_id, vocab_size=2)
    vision |= dict(architecture='test_convnext', model_args=dict(dims=[8, 8, 16, 32]), hidden_size=32)
    return small(t.Gemma3nConfig(text_config=words(tok, vocab_size_per_layer_input=tok.eoi_token_id), vision_config=vision, audio_config=audio,
        vision_soft_tokens_per_image=4, **ids(tok, named))), proc


def gemma4(t):
    named = dict(boi_token='<|image>', eoi_token='<image|>', image_token='<|image|>', audio_token='<|audio|>', boa_token='<|audio>', eoa_token='<audio|>')
    tok = tokenizer(named, '<|video|>')
    images, videos = (getattr(t, f'Gemma4{kind}Processor')(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2, **more)
                      for kind, more in (('Image', {}), ('Video', dict(num_frames=4))))
    proc = t.Gemma4Processor(t.Gemma4AudioFeatureExtractor(), images, tok, videos, template(image='<|image|>', video='<|video|>', audio='<|audio|>'))
    vision = dict(patch_size=8, pooling_kernel_size=2)
    marks = {f'{k}_id': v for k, v in ids(tok, named | dict(video_token='<|video|>')).items()}
    marks = {k.removesuffix('_id_id') + '_id': v for k, v in marks.items()}
    return small(t.Gemma4Config(text_config=words(tok, vocab_size_per_layer_input=len(tok)), vision_config=vision, audio_config={}, **marks)), proc


def llava_onevision(t):
    tok, grid = tokenizer(dict(image_token='<image>', video_token='<video>')), [[32, 32], [32, 64], [64, 64]]
    proc = t.LlavaOnevisionProcessor(t.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=grid), tok, t.LlavaOnevisionVideoProcessor(size=SIDE),
                                     num_image_tokens=16, vision_feature_select_strategy='full', chat_template=template(image='<image>', video='<video>'))
    vision = dict(model_type='siglip_vision_model', image_size=32, patch_size=8, vision_use_head=False)
    return small(t.LlavaOnevisionConfig(text_config=words(tok), vision_config=vision, image_grid_pinpoints=grid,
        image_token_index=tok.image_token_id, video_token_index=tok.video_token_id)), proc


def internvl(t):
    tok = tokenizer(dict(start_image_token='<img>', end_image_token='</img>', context_image_token='<IMG_CONTEXT>', video_token='<video>'))
    proc = t.InternVLProcessor(t.GotOcr2ImageProcessor(size=SIDE, max_patches=4), tok, t.InternVLVideoProcessor(size=SIDE), image_seq_length=4,
                               chat_template=template(image='<IMG_CONTEXT>', video='<video>'))
    return small(t.InternVLConfig(text_config=words(tok), vision_config=dict(image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=tok.context_image_token_id, image_seq_length=4)), proc


def idefics3(t):
    cells = [f'<row_{i + 1}_col_{j + 1}>' for i in range(2) for j in range(2)]
    tok = tokenizer(dict(image_token='<image>'), '<fake_token_around_image>', '<end_of_utterance>', '<global-img>', *cells)
    proc = t.Idefics3Processor(t.Idefics3ImageProcessor(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32)), tok, image_seq_len=4,
                               chat_template=template(image='<image>'))
    return small(t.Idefics3Config(text_config=words(tok), vision_config=dict(image_size=32, patch_size=8), scale_factor=2,
        image_token_id=tok.image_token_id, pad_token_id=0)), proc


def janus(t):
    tok = tokenizer(dict(image_token='<image_placeholder>', boi_token='<begin_of_image>', eoi_token='<end_of_image>'))
    proc = t.JanusProcessor(t.JanusImageProcessor(size=SIDE), tok, template(image='<image_placeholder>'), num_image_tokens=16)
    vision, vq = dict(image_size=32, patch_size=8, num_image_tokens=16), dict(num_embeddings=8, num_patches=4, channel_multiplier=[1, 1], num_res_blocks=1)
    return small(t.JanusConfig(text_config=words(tok, hidden_size=2048), vision_config=vision, vq_config=vq, image_token_id=tok.image_token_id)), proc


def minicpm_v(t):
    named = dict(image_token='<|image_pad|>', video_token='<|video_pad|>', image_start_token='<image>', image_end_token='</image>',
                 slice_start_token='<slice>', slice_end_token='</slice>', image_id_start_token='<image_id>', image_id_end_token='</image_id>')
    tok = tokenizer(named, *'0123456789')
    side = dict(scale_resolution=56, patch_size=14, slice_mode=False, use_image_id=False)
    proc = t.MiniCPMV4_6Processor(t.MiniCPMV4_6ImageProcessor(**side), t.MiniCPMV4_6VideoProcessor(**side), tok,
                                  template(image='<|image_pad|>', video='<|video_pad|>'))
    vision = dict(image_size=56, patch_size=14)
    return small(t.MiniCPMV4_6Config(text_config=words(tok, model_type='qwen3_5_text'), vision_config=vision,
        image_token_id=tok.image_token_id, video_token_id=tok.video_token_id)), proc


def whisper(t): return t.WhisperFeatureExtractor(feature_size=8, chunk_length=2)


def ears(): return dict(num_mel_bins=8, max_source_positions=100)          # configurations write into what they are given


def qwen2_audio(t):
    tok = tokenizer(dict(audio_token='<|AUDIO|>', audio_bos_token='<|audio_bos|>', audio_eos_token='<|audio_eos|>'))
    proc = t.Qwen2AudioProcessor(whisper(t), tok, chat_template=template(audio='<|audio_bos|><|AUDIO|><|audio_eos|>'))
    return small(t.Qwen2AudioConfig(audio_config=ears(), text_config=words(tok), audio_token_index=tok.audio_token_id)), proc


def tekken(folder, audio):
    """A file of Mistral's tokenizers: bytes, and before them special tokens, that of sounds where the processor's class expects it."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    marks = [x['token_str'].value for x in Tekkenizer.DEPRECATED_SPECIAL_TOKENS] + [f'<SPECIAL_{i}>' for i in range(20, 24)]
    marks += ['[AUDIO]', '[BEGIN_AUDIO]', '[TRANSCRIBE]']
    n = 256 + len(marks)
    config = dict(pattern=r'\s?\S+|\s+', num_vocab_tokens=256, default_vocab_size=n, default_num_special_tokens=len(marks), version='v7')
    special = [dict(rank=i, token_str=mark, is_control=True) for i, mark in enumerate(marks)]
    letters = [dict(rank=i, token_bytes=b64encode(bytes([i])).decode(), token_str=None) for i in range(256)]
    path = Path(folder)/'tekken.json'
    path.write_text(json.dumps(dict(config=config, vocab=letters, special_tokens=special, audio=audio)))
    return path


def voxtral(t):
    """No template: its class makes tokens by Mistral's own code. Sounds come in pieces of 30 seconds, which it has no option for."""
    from transformers.tokenization_mistral_common import MistralCommonBackend
    mels = dict(num_mel_bins=8, hop_length=160, window_size=400)
    with TemporaryDirectory() as folder:
        tok = MistralCommonBackend(tekken(folder, dict(sampling_rate=16_000, frame_rate=12.5, chunk_length_s=30., audio_encoding_config=mels)))
    text = dict(vocab_size=len(tok), pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id)
    config = t.VoxtralConfig(audio_config=dict(num_mel_bins=8), text_config=text, audio_token_id=tok.convert_tokens_to_ids('[AUDIO]'))
    return small(config), t.VoxtralProcessor(t.WhisperFeatureExtractor(feature_size=8), tok)


def voxtral_parts(t):
    """Voxtral's classes but for its tokenizer, which needs mistral_common: a processor of the same parts with a template."""
    class Stand(t.ProcessorMixin):
        def __init__(self, feature_extractor, tokenizer, chat_template=None):
            self.audio_token, self.audio_token_id = '[AUDIO]', tokenizer.audio_token_id
            super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        def __call__(self, text=None, audio=None, return_tensors=None, add_special_tokens=False, **_):
            sounds = self.feature_extractor(audio, sampling_rate=16_000, return_tensors='pt') if audio is not None else {}
            texts = [x.replace('[AUDIO]', '[AUDIO] ' * 25) for x in ([text] if isinstance(text, str) else text)]
            return t.BatchFeature({**self.tokenizer(texts, return_tensors='pt'), **sounds})
    tok = tokenizer(dict(audio_token='[AUDIO]'))
    config = t.VoxtralConfig(audio_config=ears(), text_config=words(tok), audio_token_id=tok.audio_token_id)
    return small(config), Stand(whisper(t), tok, template(audio='[AUDIO]'))


def omni(t, name, patch, text, vision=None):
    """The thinker alone: it takes everything and answers in text."""
    tok = tokenizer(OMNI)
    proc = getattr(t, f'{name}Processor')(*eyes(t, patch), whisper(t), tok, chat_template=template(**HEARD))
    marks = {f'{new}_token_{end}': tok.convert_tokens_to_ids(OMNI[f'{old}_token']) for old, new in dict(image='image', video='video', audio='audio',
             vision_bos='vision_start', audio_bos='audio_start', audio_eos='audio_end').items() for end in ('id', 'index')}
    return small(getattr(t, f'{name}ThinkerConfig')(text_config=words(tok, **text), vision_config=vision or {}, audio_config=ears(), **marks)), proc


def qwen2_5_omni(t): return omni(t, 'Qwen2_5Omni', 14, rope(16, 24, 24), dict(window_size=28))


def qwen3_omni(t): return omni(t, 'Qwen3OmniMoe', 16, rope(24, 20, 20))


def mllama(t):
    tok = tokenizer(dict(image_token='<|image|>'), '<|python_tag|>')
    tok.bos_token = '<user>'
    proc = t.MllamaProcessor(t.MllamaImageProcessor(size=SIDE, max_image_tiles=1), tok, template(image='<|image|>'))
    vision = dict(image_size=32, patch_size=8, max_num_tiles=1, supported_aspect_ratios=[[1, 1]])
    return small(t.MllamaConfig(text_config=words(tok, bos_token_id=2), vision_config=vision, image_token_index=tok.image_token_id)), proc


def llama4(t, **more):
    named = dict(image_token='<|image|>', boi_token='<|image_start|>', eoi_token='<|image_end|>', patch_token='<|patch|>')
    tok = tokenizer(named, '<|tile_x_separator|>', '<|tile_y_separator|>')
    proc = t.Llama4Processor(t.Llama4ImageProcessor(size=SIDE, max_patches=1), tok, patch_size=8, chat_template=template(image='<|image|>'))
    wide = dict.fromkeys(('vision_output_dim', 'projector_input_dim', 'projector_output_dim'), 4096)
    vision = wide | dict(hidden_size=1408, intermediate_size=5632, image_size=32, patch_size=8)
    return small(t.Llama4Config(text_config=words(tok, **more), vision_config=vision, boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.patch_token_id)), proc


def phi4(t):
    tok = tokenizer(dict(image_token='<|image|>', audio_token='<|audio|>'))
    images = t.Phi4MultimodalImageProcessor(dynamic_hd=1)
    proc = t.Phi4MultimodalProcessor(images, t.Phi4MultimodalFeatureExtractor(), tok, chat_template=template(image='<|image|>', audio='<|audio|>'))
    vision = dict(image_token_id=tok.image_token_id)
    return small(t.Phi4MultimodalConfig(**words(tok), vision_config=vision, audio_config=dict(audio_token_id=tok.audio_token_id))), proc
