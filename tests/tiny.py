"""Tiny models of every architecture, built from configs, and a tiny tokenizer."""

import copy
import itertools

import torch
import transformers
from third_party_persimmon import register_persimmon
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing

from optimum_fwdprune import PruningConfig, find_sites
from optimum_fwdprune.request.registry import METHODS


register_persimmon()

VOCAB = 300
_LLAMA_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}
_MULTI_HEAD_SIZES = {key: value for key, value in _LLAMA_SIZES.items() if key != "num_key_value_heads"}
_OPT_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}

# Two layers whose attention sees 8 tokens and one that sees all, whatever the family calls the pattern.
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128}
_FALCON_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "ffn_hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Every family, and what its models may differ in: multi-head, grouped and multi-query attention; biases; tied
# embeddings; head widths of their own; sliding windows; norms.
CONFIGS = {
    "llama_mha_tied": (
        transformers.LlamaConfig,
        {**_LLAMA_SIZES, "num_key_value_heads": 6, "tie_word_embeddings": True},
    ),
    "llama_gqa_biases": (transformers.LlamaConfig, {**_LLAMA_SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama_mqa": (transformers.LlamaConfig, {**_LLAMA_SIZES, "num_key_value_heads": 1}),
    "llama3_head_dim": (transformers.LlamaConfig, {**_LLAMA_SIZES, "head_dim": 10, "rope_parameters": _LLAMA3_ROPE}),
    "mistral_sliding_window": (transformers.MistralConfig, {**_LLAMA_SIZES, "sliding_window": 8}),
    "opt_pre_norm": (transformers.OPTConfig, _OPT_SIZES),
    "opt_post_norm_projected": (
        transformers.OPTConfig,
        {**_OPT_SIZES, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
    ),
    "opt_no_biases": (transformers.OPTConfig, {**_OPT_SIZES, "enable_bias": False}),
    "bloom": (transformers.BloomConfig, {"vocab_size": VOCAB, "hidden_size": 48, "n_head": 6, "n_layer": 3}),
    "qwen2": (transformers.Qwen2Config, _LLAMA_SIZES),
    "qwen3": (transformers.Qwen3Config, {**_LLAMA_SIZES, "head_dim": 16}),
    "apertus": (transformers.ApertusConfig, {**_LLAMA_SIZES, "rope_parameters": _LLAMA3_ROPE}),
    "arcee": (transformers.ArceeConfig, {**_LLAMA_SIZES, "mlp_bias": True}),
    "cohere": (transformers.CohereConfig, _LLAMA_SIZES),
    "cohere_query_norms": (transformers.CohereConfig, {**_LLAMA_SIZES, "use_qk_norm": True}),
    "cohere2": (transformers.Cohere2Config, {**_LLAMA_SIZES, **_SLIDING}),
    "ernie4_5": (transformers.Ernie4_5Config, {**_LLAMA_SIZES, "head_dim": 16, "use_bias": True}),
    "exaone4": (transformers.Exaone4Config, {**_LLAMA_SIZES, **_SLIDING}),
    "gemma": (transformers.GemmaConfig, {**_LLAMA_SIZES, "head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {**_LLAMA_SIZES, **_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        {**_LLAMA_SIZES, **_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "granite": (transformers.GraniteConfig, {**_LLAMA_SIZES, **_SCALES}),
    "helium": (transformers.HeliumConfig, {**_LLAMA_SIZES, "head_dim": 8}),
    "hunyuan_v1_dense": (transformers.HunYuanDenseV1Config, {**_LLAMA_SIZES, "head_dim": 16}),
    "ministral": (transformers.MinistralConfig, {**_LLAMA_SIZES, **_SLIDING, "head_dim": 16}),
    "ministral3": (transformers.Ministral3Config, {**_LLAMA_SIZES, "head_dim": 16}),
    "nemotron": (transformers.NemotronConfig, {**_LLAMA_SIZES, "attention_bias": True}),
    "olmo": (transformers.OlmoConfig, {**_LLAMA_SIZES, "clip_qkv": 1.0}),
    "olmo2": (transformers.Olmo2Config, _LLAMA_SIZES),
    "olmo3": (transformers.Olmo3Config, {**_LLAMA_SIZES, **_SLIDING}),
    "phi": (transformers.PhiConfig, {**_LLAMA_SIZES, "qk_layernorm": True}),
    "seed_oss": (transformers.SeedOssConfig, {**_LLAMA_SIZES, "head_dim": 16}),
    "smollm3": (
        transformers.SmolLM3Config,
        {
            **_LLAMA_SIZES,
            "use_sliding_window": True,
            "sliding_window": 8,
            "no_rope_layers": [1, 0, 1],
            "pad_token_id": 0,
        },
    ),
    "stablelm": (transformers.StableLmConfig, {**_LLAMA_SIZES, "use_qkv_bias": True}),
    "stablelm_parallel_query_norms": (
        transformers.StableLmConfig,
        {**_LLAMA_SIZES, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2": (transformers.Starcoder2Config, {**_LLAMA_SIZES, "sliding_window": 8}),
    "gpt_neox": (transformers.GPTNeoXConfig, _MULTI_HEAD_SIZES),
    "gpt_neox_sequential": (transformers.GPTNeoXConfig, {**_MULTI_HEAD_SIZES, "use_parallel_residual": False}),
    "phi3": (transformers.Phi3Config, {**_LLAMA_SIZES, "pad_token_id": 0}),
    "glm": (transformers.GlmConfig, {**_LLAMA_SIZES, "head_dim": 16, "pad_token_id": 0}),
    "glm4": (transformers.Glm4Config, {**_LLAMA_SIZES, "head_dim": 16, "pad_token_id": 0}),
    "gptj": (transformers.GPTJConfig, {**_GPT2_SIZES, "n_inner": 64, "rotary_dim": 8}),
    "codegen": (transformers.CodeGenConfig, {**_GPT2_SIZES, "n_embd": 64, "n_head": 8, "rotary_dim": 8}),
    "falcon_multi_query": (transformers.FalconConfig, _FALCON_SIZES),
    "falcon_grouped": (
        transformers.FalconConfig,
        {**_FALCON_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon_alibi": (
        transformers.FalconConfig,
        {**_FALCON_SIZES, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "gpt2": (transformers.GPT2Config, {**_GPT2_SIZES, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}),
    "persimmon_third_party": (transformers.PersimmonConfig, _MULTI_HEAD_SIZES),
}

# No single head of these can be removed.
FIXED_HEADS = ("olmo2", "olmo3")

# One of every layout: grouped-query attention with rotary positions, learned positions, ALiBi with fused sources,
# norms after the projections, and attention and MLP side by side. Tests of all combinations run on these.
REPRESENTATIVE = ("llama_gqa_biases", "opt_pre_norm", "bloom", "gemma2", "cohere")


def crossed(architectures=REPRESENTATIVE, **options):
    """Arguments of `parametrize` for a test of `architecture_name` and options, which are lists of values.

    The first three representative architectures have all combinations, and the others as few as it takes to have every
    value.
    """
    combinations = list(itertools.product(*options.values()))
    longest = max(map(len, options.values()))
    every_value = [tuple(values[index % len(values)] for values in options.values()) for index in range(longest)]
    cases = [
        (architecture, *case)
        for architecture in architectures
        for case in (combinations if architecture in REPRESENTATIVE[:3] else every_value)
    ]
    return ("architecture_name", *options), cases


def make_config(name, **changes):
    """Build the config of a tiny architecture."""
    config_class, values = CONFIGS[name]
    return config_class(**{**values, **changes})


def make_model(name, auto_class=transformers.AutoModelForCausalLM, seed=0, dtype=torch.float32, **changes):
    """Build a dense tiny model with random weights, biases and norms included, in eval mode."""
    torch.manual_seed(seed)
    # Not `.to(dtype)`, which rounds the rotary frequencies that from_pretrained keeps in float32.
    model = auto_class.from_config(make_config(name, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Initial biases are zero and norms one, which would hide a bias or a norm that is cut wrongly.
            if parameter.dim() == 1 or "norm" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    return model.eval()


# What the methods' authors publish behind their scores; of the others least squares.
PUBLISHED_RECONSTRUCTION = {"flap": "bias", "magnitude": "none", "random": "none"}


def methods_of_dense_models():
    """The methods that score units of models without experts."""
    return sorted(name for name, method in METHODS.items() if method.kinds != ("expert",))


def kinds_scored_by(method):
    """Heads and channels, or layers or experts for a method that does not score these."""
    own = METHODS[method].kinds if method in METHODS else ()
    return ["attention", "mlp"] if "mlp" in own or not own else [own[0]]


def request(method="wanda_sp", **fields):
    """A request for heads and channels, so that sites of both kinds are tested, with the usual reconstruction."""
    fields.setdefault("kinds", kinds_scored_by(method))
    fields.setdefault("reconstruction", PUBLISHED_RECONSTRUCTION.get(method, "least_squares"))
    return PruningConfig(method, **fields)


def caches_of(model):
    """The kinds of caches that the stock class of a model computes with."""
    # With ALiBi, Falcon makes positions for as many tokens as there are, and not for the whole of a static cache.
    return ["dynamic"] if getattr(model.config, "alibi", False) else ["dynamic", "static"]


def kinds_of(name):
    """The kinds of units that a tiny architecture can lose."""
    return ["mlp"] if name in FIXED_HEADS else ["attention", "mlp"]


# Where a method's result does not matter, only that it runs: a few steps or draws.
SHORT: dict[str, dict] = {"policy_gradient": {"steps": 3}, "mini_llm": {"draws": 3}}


@torch.no_grad()
def projection_inputs(model, site, tokens, mask=None):
    """What reaches a site's projection, padding left out: a numpy array `[tokens, in_features]`, float64."""
    seen = []
    handle = site.projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, -2)))
    model(tokens, attention_mask=mask)
    handle.remove()
    return (seen[0] if mask is None else seen[0][mask.bool().flatten()]).double().numpy()


def masks_of(plan):
    """Gates of a plan: 1 for kept units."""
    return {
        key: torch.isin(torch.arange(plan.num_units[key]), torch.tensor(kept)).float()
        for key, kept in plan.kept.items()
    }


def make_tokenizer(begins_texts=False):
    """Train a byte-level BPE tokenizer on a few words, which may write BOS before a text, as LLaMA's does."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the quick brown fox jumps over the lazy dog"], vocab_size=VOCAB - 2, min_frequency=1)
    trained.add_special_tokens(["<s>", "</s>"])
    if begins_texts:
        trained.post_processor = TemplateProcessing("<s> $A", None, [("<s>", trained.token_to_id("<s>"))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")


def counted_seconds(runs, repeats, device):
    """In the place of `timing.median_seconds`: what a layer or model holds is what it takes: no noise, no waiting."""
    found = []
    for run in runs:
        found.append(1e-9 * run.times * sum(parameter.numel() for parameter in run.module.parameters()))
    return found


@torch.no_grad()
def masked_by_hand(model, plan):
    """A copy of the dense model whose projections have zero columns for the units that the plan removes."""
    masked = copy.deepcopy(model)
    for site in find_sites(masked, plan.attention_unit):
        columns = site.projection.weight.view(site.projection.out_features, site.num_units, site.unit_width)
        columns[:, plan.removed(site.key)] = 0
    return masked
