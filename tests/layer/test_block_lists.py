"""Models with several lists of blocks: the one that counts is the text's, and the last to run."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import ila
from ila.models.blocks import find_blocks, frozen_blocks

TEXT = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "patch_size": 4}
IMAGE = {"image_size": 8, "num_hidden_layers": 5}
LONGER = 5  # blocks of each tower; the text has 2


def llava():
    text, vision = LlamaConfig(**TEXT, **HEADS), CLIPVisionConfig(**TOWER, **IMAGE)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    return LlavaForConditionalGeneration(config), "language_model"


def gemma3():
    text = {**TEXT, **HEADS, "head_dim": 8}
    vision = {**TOWER, **IMAGE}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.image_token_id = 63
    return Gemma3ForConditionalGeneration(config), "language_model"


def qwen_vl():
    vision = {"depth": LONGER, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, **HEADS, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config), "language_model"


def qwen_audio():
    audio = {"encoder_layers": LONGER, "d_model": 16, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 24, "num_mel_bins": 8}
    text = {"model_type": "qwen2", **TEXT, **HEADS}
    config = Qwen2AudioConfig(audio_config=audio, text_config=text)
    return Qwen2AudioForConditionalGeneration(config), "language_model"


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 64}
    config = T5Config(num_layers=LONGER, num_decoder_layers=2, **sizes)
    return T5ForConditionalGeneration(config), "decoder"


@pytest.fixture(params=[llava, gemma3, qwen_vl, qwen_audio, t5], ids=lambda f: f.__name__)
def several(request, tiny):
    base, inside = request.param()
    kinds = r"(q|k|v|o|wi|wo)" if inside == "decoder" else r"(q|k|v|o|up|down)_proj"
    config = tiny.config(target_modules=rf"(.*\.)?{inside}\..*\.{kinds}", task_type=None)
    return ila.attach(base, config).train(), inside


def test_the_texts_blocks_are_found(several):
    model, inside = several
    blocks = find_blocks(model)
    name = next(n for n, m in model.named_modules() if m is blocks.layers)
    assert f".{inside}." in name and len(blocks.layers) == 2


def test_explain_checkpoints_and_prefix_count_them(several, tiny):
    model, _ = several
    names = list(tiny.layers(model))
    assert len(ila.explain(model)) == len(names)
    assert ila.gradient_checkpointing(model) == 2
    first = [name for name in names if ".0." in name.rpartition("decoder.")[2]]
    gates = {name: name not in first for name in names}
    ila.apply_mask(model, ila.LayerMask(dict.fromkeys(names, 1.0), gates))
    assert frozen_blocks(model) == 1
    assert ila.gradient_checkpointing(model) == 1
    prefix = {row.module for row in ila.explain(model) if row.in_prefix}
    assert prefix and prefix <= set(first)


def test_a_tower_that_is_trained_leaves_no_prefix(several):
    """What it gives comes in before the first block of the text."""
    model, inside = several
    model.requires_grad_(False)
    assert frozen_blocks(model) == 2
    tower = next(p for n, p in model.named_parameters() if inside not in n and "lm_head" not in n)
    tower.requires_grad_()
    assert frozen_blocks(model) == 0
    tower.requires_grad_(False)
    head = next(m for n, m in model.named_modules() if n.endswith("lm_head"))
    tied = head.weight is model.get_input_embeddings().weight
    head.weight.requires_grad_()
    assert frozen_blocks(model) == (0 if tied else 2)


def test_a_step_through_a_picture_is_peft_s(tiny):
    def step(model):
        torch.manual_seed(4)
        ids = tiny.tokens(2, 9)
        ids[ids == 63] = 1
        ids[:, 1:5] = 63
        pictures = torch.randn(2, 3, 8, 8)
        logits = model(input_ids=ids, pixel_values=pictures).logits
        logits.sin().sum().backward()
        named = model.named_parameters()
        return {"logits": logits.detach()} | {n: p.grad for n, p in named if p.grad is not None}

    found = []
    for make in (tiny.plain, tiny.attached):
        torch.manual_seed(1)
        base = llava()[0]
        config = tiny.config(target_modules="all-linear", exclude_modules=r".*vision.*")
        model = make(config, base).train()
        if make is tiny.attached:
            ila.gradient_checkpointing(model)
        found.append(step(model))
    tiny.assert_close(found[1], found[0], tolerance=1e-5)
