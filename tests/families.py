"""Tiny random models of published multimodal families, of the very same classes, with their own processors. `t` is the module transformers."""

WORDS = '<pad> <end> <user> <assistant> <unk> how many are there ? what is this here two one of them look at the following and say :'.split()
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.3,
            max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None)
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=.2)
QWEN = dict(image_token='<|image_pad|>', video_token='<|video_pad|>', vision_start_token='<|vision_start|>', vision_end_token='<|vision_end|>')
SEEN = dict(image='<|vision_start|><|image_pad|><|vision_end|>', video='<|vision_start|><|video_pad|><|vision_end|>')


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


def alive(model):
    """Nothing starts at zero, so that nothing hides behind it; a dead weight would get no gradient, or let none through."""
    import torch
    with torch.no_grad():
        for p in model.parameters():
            if not p.any(): p.normal_(0, .1)
    model.generation_config.eos_token_id = 1
    model.set_attn_implementation('forest')
    return model.eval()


def rope(*sections): return dict(rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=sections))


def qwen_vision(patch, **more):
    return dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=patch, initializer_range=.2) | more


def eyes(t, patch, video='Qwen2VLVideoProcessor'):
    """Image and video processors of the Qwen families: at most 4 × 4 patches a picture."""
    least, most = (2 * patch)**2, (4 * patch)**2
    images = t.Qwen2VLImageProcessor(patch_size=patch, min_pixels=least, max_pixels=most)
    return images, getattr(t, video)(patch_size=patch, size=dict(shortest_edge=least, longest_edge=4 * most))


def qwen_vl(t, name, patch, text, vision, video='Qwen2VLVideoProcessor', processor=None):
    """Qwen2.5-VL, Qwen3-VL and Qwen3.5 differ in their layers only."""
    tok, (images, videos) = tokenizer(QWEN), eyes(t, patch, video)
    proc = getattr(t, processor or f'{name}Processor')(images, tok, videos, chat_template=template(**SEEN))
    config = getattr(t, f'{name}Config')(text_config=TEXT | dict(vocab_size=len(tok)) | text, vision_config=qwen_vision(patch, **vision), **ids(tok, QWEN))
    return getattr(t, f'{name}ForConditionalGeneration')(config), proc


def qwen2_5_vl(t): return qwen_vl(t, 'Qwen2_5_VL', 14, rope(1, 1, 2), dict(fullatt_block_indexes=[1], window_size=28))


def qwen3_vl(t):
    return qwen_vl(t, 'Qwen3VL', 16, rope(2, 1, 1) | dict(head_dim=8, num_hidden_layers=3), dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=16),
                   'Qwen3VLVideoProcessor')


def qwen3_5(t):
    delta = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    return qwen_vl(t, 'Qwen3_5', 16, rope(2, 1, 1) | delta | dict(head_dim=8, num_hidden_layers=4, partial_rotary_factor=1.),
                   dict(num_position_embeddings=16), 'Qwen3VLVideoProcessor', 'Qwen3VLProcessor')


def gemma3(t, tokens=4):
    named = dict(boi_token='<start_of_image>', eoi_token='<end_of_image>', image_token='<image_soft_token>')
    tok = tokenizer(named)
    images = t.Gemma3ImageProcessor(size=dict(height=32, width=32))
    proc = t.Gemma3Processor(images, tok, chat_template=template(image='<start_of_image>'), image_seq_length=tokens)
    text = TEXT | dict(vocab_size=len(tok), head_dim=8, query_pre_attn_scalar=8, sliding_window=7, sliding_window_pattern=2)
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(text_config=text, vision_config=TOWER | dict(image_size=32, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=tokens, boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id, image_token_index=tok.image_token_id)), proc


def gemma3_long(t): return gemma3(t, 16)


def llava_onevision(t):
    named = dict(image_token='<image>', video_token='<video>')
    tok, grid, size = tokenizer(named), [[32, 32], [32, 64], [64, 64]], dict(height=32, width=32)
    proc = t.LlavaOnevisionProcessor(t.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid), tok, t.LlavaOnevisionVideoProcessor(size=size),
                                     num_image_tokens=16, vision_feature_select_strategy='full', chat_template=template(image='<image>', video='<video>'))
    vision = TOWER | dict(model_type='siglip_vision_model', image_size=32, patch_size=8, vision_use_head=False)
    return t.LlavaOnevisionForConditionalGeneration(t.LlavaOnevisionConfig(text_config=TEXT | dict(vocab_size=len(tok)), vision_config=vision,
        image_grid_pinpoints=grid, image_token_index=tok.image_token_id, video_token_index=tok.video_token_id)), proc


def internvl(t):
    named = dict(start_image_token='<img>', end_image_token='</img>', context_image_token='<IMG_CONTEXT>', video_token='<video>')
    tok, size = tokenizer(named), dict(height=32, width=32)
    proc = t.InternVLProcessor(t.GotOcr2ImageProcessor(size=size, max_patches=4), tok, t.InternVLVideoProcessor(size=size), image_seq_length=4,
                               chat_template=template(image='<IMG_CONTEXT>', video='<video>'))
    return t.InternVLForConditionalGeneration(t.InternVLConfig(text_config=TEXT | dict(vocab_size=len(tok)), vision_config=TOWER | dict(image_size=32,
        patch_size=8), image_token_id=tok.context_image_token_id, image_seq_length=4)), proc


def idefics3(t):
    cells = [f'<row_{i + 1}_col_{j + 1}>' for i in range(2) for j in range(2)]
    tok = tokenizer(dict(image_token='<image>'), '<fake_token_around_image>', '<end_of_utterance>', '<global-img>', *cells)
    proc = t.Idefics3Processor(t.Idefics3ImageProcessor(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32)), tok, image_seq_len=4,
                               chat_template=template(image='<image>'))
    return t.Idefics3ForConditionalGeneration(t.Idefics3Config(text_config=TEXT | dict(vocab_size=len(tok)), vision_config=TOWER | dict(image_size=32,
        patch_size=8), scale_factor=2, image_token_id=tok.image_token_id, pad_token_id=0)), proc


def whisper(t): return t.WhisperFeatureExtractor(feature_size=8, chunk_length=1)


AUDIO = dict(num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, d_model=32, max_source_positions=50, initializer_range=.2)


def qwen2_audio(t):
    named = dict(audio_token='<|AUDIO|>', audio_bos_token='<|audio_bos|>', audio_eos_token='<|audio_eos|>')
    tok = tokenizer(named)
    proc = t.Qwen2AudioProcessor(whisper(t), tok, chat_template=template(audio='<|audio_bos|><|AUDIO|><|audio_eos|>'))
    return t.Qwen2AudioForConditionalGeneration(t.Qwen2AudioConfig(audio_config=AUDIO, text_config=TEXT | dict(vocab_size=len(tok)),
        audio_token_index=tok.audio_token_id)), proc


OMNI = dict(image_token='<|IMAGE|>', video_token='<|VIDEO|>', audio_token='<|AUDIO|>', vision_bos_token='<|vision_bos|>', vision_eos_token='<|vision_eos|>',
            audio_bos_token='<|audio_bos|>', audio_eos_token='<|audio_eos|>')
HEARD = dict(image='<|vision_bos|><|IMAGE|><|vision_eos|>', video='<|vision_bos|><|VIDEO|><|vision_eos|>', audio='<|audio_bos|><|AUDIO|><|audio_eos|>')


def omni(t, name, patch, text, vision, audio):
    """The thinker alone: it takes everything and answers in text."""
    tok = tokenizer(OMNI)
    proc = getattr(t, f'{name}Processor')(*eyes(t, patch), whisper(t), tok, chat_template=template(**HEARD))
    marks = {f'{new}_token_{end}': tok.convert_tokens_to_ids(OMNI[f'{old}_token']) for old, new in dict(image='image', video='video', audio='audio',
             vision_bos='vision_start', audio_bos='audio_start', audio_eos='audio_end').items() for end in ('id', 'index')}
    config = getattr(t, f'{name}ThinkerConfig')(text_config=TEXT | dict(vocab_size=len(tok)) | text, vision_config=qwen_vision(patch, **vision),
                                                audio_config=AUDIO | dict(output_dim=32) | audio, **marks)
    return getattr(t, f'{name}ThinkerForConditionalGeneration')(config), proc


def qwen2_5_omni(t): return omni(t, 'Qwen2_5Omni', 14, rope(1, 1, 2), dict(fullatt_block_indexes=[1], window_size=28), dict(n_window=10))


def qwen3_omni(t):
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, num_hidden_layers=3)
    return omni(t, 'Qwen3OmniMoe', 16, rope(2, 1, 1) | experts, dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=16),
                dict(downsample_hidden_size=8))


def janus(t):
    named = dict(image_token='<image_placeholder>', boi_token='<begin_of_image>', eoi_token='<end_of_image>')
    tok = tokenizer(named)
    proc = t.JanusProcessor(t.JanusImageProcessor(size=dict(height=32, width=32)), tok, template(image='<image_placeholder>'), num_image_tokens=16)
    vision = {k: v for k, v in TOWER.items() if k != 'intermediate_size'} | dict(image_size=32, patch_size=8, projection_dim=32, num_image_tokens=16)
    vq = dict(embed_dim=8, num_embeddings=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, projection_dim=32,
              image_token_embed_dim=32)
    return t.JanusForConditionalGeneration(t.JanusConfig(text_config=TEXT | dict(vocab_size=len(tok)), vision_config=vision, vq_config=vq,
        image_token_id=tok.image_token_id)), proc


def mllama(t):
    tok = tokenizer(dict(image_token='<|image|>'), '<|python_tag|>')
    tok.bos_token = '<user>'
    proc = t.MllamaProcessor(t.MllamaImageProcessor(size=dict(height=32, width=32), max_image_tiles=1), tok, template(image='<|image|>'))
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=2, image_size=32, patch_size=8,
                  max_num_tiles=1, vision_output_dim=64, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]])
    text = TEXT | dict(vocab_size=len(tok), cross_attention_layers=[1], bos_token_id=2)
    return t.MllamaForConditionalGeneration(t.MllamaConfig(text_config=text, vision_config=vision, image_token_index=tok.image_token_id)), proc


def llama4(t, **more):
    named = dict(image_token='<|image|>', boi_token='<|image_start|>', eoi_token='<|image_end|>', patch_token='<|patch|>')
    tok = tokenizer(named, '<|tile_x_separator|>', '<|tile_y_separator|>')
    images = t.Llama4ImageProcessor(size=dict(height=32, width=32), max_patches=1)
    proc = t.Llama4Processor(images, tok, patch_size=8, chat_template=template(image='<|image|>'))
    text = TEXT | dict(vocab_size=len(tok), head_dim=8, intermediate_size_mlp=48, num_local_experts=2, num_hidden_layers=4, attention_chunk_size=8) | more
    vision = TOWER | dict(image_size=32, patch_size=8, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32, intermediate_size=128)
    return t.Llama4ForConditionalGeneration(t.Llama4Config(text_config=text, vision_config=vision, boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id, image_token_index=tok.patch_token_id)), proc
