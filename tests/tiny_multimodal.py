"""Tiny models of every multimodal family, with an image made by hand."""

from unittest import mock

import tiny
import torch
import transformers


IMAGE, START, END = tiny.VOCAB - 1, tiny.VOCAB - 2, tiny.VOCAB - 3

# The tokens of an image stand for features of it: two by two.
IMAGE_TOKENS = 4

_TEXT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}
_GEMMA3_TEXT = {
    **_TEXT,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_QWEN_TEXT = {
    **_TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
}
_QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 48,
}
_QWEN_TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}

CONFIGS = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=_GEMMA3_TEXT,
        vision_config={**_VISION, "patch_size": 4},
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    "llava_llama": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config={**_VISION, "patch_size": 8, "projection_dim": 32, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
    ),
    "llava_mistral": lambda: transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**_TEXT, sliding_window=8),
        vision_config={**_VISION, "patch_size": 8, "projection_dim": 32, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=_QWEN_TEXT,
        vision_config={**_QWEN_VISION, "window_size": 8, "fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config={**_QWEN_TEXT, "head_dim": 8},
        vision_config={**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_QWEN_TOKENS,
    ),
}


def make_model(name, auto_class=transformers.AutoModelForImageTextToText):
    """Build a dense tiny model with random weights, biases and norms included, in eval mode."""
    torch.manual_seed(0)
    model = auto_class.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            # The projection of images starts at zero in Gemma 3.
            parameter.mul_(1 if parameter.dim() == 1 else 5).add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prompt(name, seed=0):
    """A text with an image in it, as the processor of the family would make it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [5, 6, START, *[IMAGE] * IMAGE_TOKENS, END, 7, 8]
    inputs = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64)}
    of_image = (inputs["input_ids"] == IMAGE).long()
    if name.startswith("qwen"):
        # Sixteen patches of two equal frames, of which two by two are merged.
        return inputs | {
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": of_image,
        }
    inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    return inputs | ({"token_type_ids": of_image} if name == "gemma3" else {})


def text_tokens():
    """Calibration tokens without an image: 16 windows of 24."""
    return torch.randint(0, END, (16, 24), generator=torch.Generator().manual_seed(1))


# The tokens IMAGE, START and END of every family.
_MARKS = {
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    "llava": {"image_token": "<image>", "start": "<start>", "end": "<end>"},
    "qwen": {
        "image_token": "<|image_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
}
PLACE_OF_IMAGE = {
    "gemma3": "<boi>",
    "llava_llama": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}


def make_processor(name):
    """Build a processor of a family whose tokens are those of its tiny model."""
    tokenizer = tiny.make_tokenizer()
    marks = _MARKS[name if name == "gemma3" else name.partition("_")[0].rstrip("2")]
    tokenizer.add_tokens([f"<unused {number}>" for number in range(len(tokenizer), END)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unused 290>",
        # Added in their order, and saved with their names.
        model_specific_special_tokens=dict(reversed(marks.items())),
    )
    assert tokenizer.convert_tokens_to_ids(list(marks.values())) == [IMAGE, START, END]
    if name == "gemma3":
        images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=IMAGE_TOKENS)
    if name.startswith("llava"):
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        return transformers.LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 256}
    )
    # Its processor of videos needs torchvision.
    with mock.patch.object(transformers.ProcessorMixin, "check_argument_for_proper_class"):
        return transformers.Qwen2_5_VLProcessor(images, tokenizer, None)
