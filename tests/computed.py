"""What a model computes and generates, for processes that compare the same checkpoint. Needs transformers alone."""

import torch


@torch.no_grad()
def outputs_of(model, tokens, attention, caches):
    """Return first outputs, and greedy text with every cache, after prompts with left padding, and with beams.

    The result is a dict, whose keys name the way and the implementation of attention.

    Args:
        model (`PreTrainedModel`): the model.
        tokens (`Tensor[batch, sequence]`, int64): two prompts or more, of six tokens or more.
        attention (list of `str`): implementations of attention.
        caches (list of `str`): implementations of the cache; the first is also used with padding and beams.
    """
    outputs = {}
    for implementation in attention:
        model.set_attn_implementation(implementation)
        outputs[f"first.{implementation}"] = model(tokens)[0].contiguous()
        if not model.can_generate():
            continue
        for cache in caches:
            outputs[f"{cache}.{implementation}"] = _generated(model, tokens[:, :6], cache)
        outputs[f"padded.{implementation}"] = _generated(model, tokens[:, :6], caches[0], padding=2)
        outputs[f"beams.{implementation}"] = _generated(model, tokens[:, :6], caches[0], padding=2, num_beams=3)
    return outputs


def _generated(model, prompts, cache, padding=0, **options):
    mask = torch.ones_like(prompts)
    mask[0, :padding] = 0
    generated = model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        cache_implementation=None if cache == "dynamic" else cache,
        pad_token_id=0,
        **options,
    )
    return generated.contiguous()
