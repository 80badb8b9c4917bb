"""GGUF export: a single file that llama.cpp runs, also where layers differ in size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..architectures import get_architecture, is_pruned
from ..architectures.depth import layer_configs
from ..architectures.gguf import GGUFRules, gguf_rules
from ..architectures.wrapping import check_in_memory, check_no_adapters
from ..files import check_output_file
from ..loading.offloading import read_parameter
from ..loading.state import check_not_consumed
from ..models.layout import DecoderLayout
from ..models.per_layer import stock_config
from ..request.gguf import GGUF_TYPES
from ..runs.loggers import get_logger
from .gguf_experts import add_experts, check_experts, mixture_paths, mixture_tensors
from .gguf_families import GGUFFamily, LayerSizes, family_of
from .gguf_fields import context_length, rope_tensors
from .gguf_quantize import find_llama_quantize
from .gguf_skipped import sizes_in_file, stand_ins
from .gguf_tensors import GGUFTensor, write_tensors
from .gguf_tokenizer import add_tokenizer, name_for


if TYPE_CHECKING:
    from gguf import GGUFWriter


logger = get_logger(__name__)

# The dtypes of files from which llama-quantize makes others, by that of the model.
UNQUANTIZED = {torch.float16: "f16", torch.bfloat16: "bf16"}


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    dtype: str = "f16",
    overwrite: bool = False,
    pre_tokenizer: str | None = None,
) -> Path:
    """Write a causal language model, dense or pruned, to a GGUF file.

    The file appears whole or not at all. Tensors, offloaded ones too, are read and converted one at a time.

    Args:
        model (`PreTrainedModel`): of a family that llama.cpp supports. The layers of LLaMA and Mistral may differ in
            size and lack their attention or MLP, and those of other families may not. Some families must have all
            their heads.
        tokenizer (`PreTrainedTokenizerBase`): a fast BPE tokenizer, byte-level or SentencePiece's; its chat template
            is written too.
        file (`str` or `Path`): file to write.
        dtype (`str`, defaults to `"f16"`): dtype of matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 (f16
            where the length of rows is no multiple of 32), or a type such as q4_k_m that llama.cpp's program
            `llama-quantize` writes, which must be on the PATH. Vectors are written in float32.
        overwrite (`bool`, defaults to `False`): replace a file that exists.
        pre_tokenizer (`str`, *optional*): llama.cpp's name for the way text is split before byte-level BPE; by default
            it is detected.

    Raises:
        ValueError: where llama.cpp cannot hold the model or its tokenizer; the message names the reason.
        FileExistsError: where the file exists.
        FileNotFoundError: where the type needs `llama-quantize`, and it is not on the PATH.
        RuntimeError: where it fails; the message has its last lines.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError('The GGUF export needs gguf: pip install "optimum-fwdprune[gguf]".') from error
    check_in_memory(model)
    check_not_consumed(model)
    check_no_adapters(model, "an export cannot hold")
    file = check_output_file(file, overwrite)
    if dtype not in GGUF_TYPES:
        raise ValueError(f"dtype must be one of {', '.join(GGUF_TYPES)}; got {dtype!r}.")
    if GGUF_TYPES[dtype].quantize:
        quantize = find_llama_quantize(dtype)
        # The weights as they are.
        dtype = UNQUANTIZED.get(model.dtype, "f32")
    else:
        quantize = None
    config = stock_config(model.config) if is_pruned(model.config) else model.config
    rules, family = _rules_of(config, model), family_of(config.model_type)
    architecture = get_architecture(model.config)
    layers = {
        path: LayerSizes.of(layer, architecture.layout, getattr(layer_config, "skip", ()))
        for (path, layer), layer_config in zip(architecture.layers(model), layer_configs(model.config), strict=True)
    }
    check_experts(rules.uniform, architecture.layout.experts, list(layers.values()))
    name = _name_of(rules, list(layers.values()))
    _check_heads(rules, list(layers.values()), config)
    tensors = list(_tensors(model, Conversion(config, rules, family, architecture.layout, layers, name)))
    unfinished = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(unfinished, name)
    try:
        writer.add_name(name_for(Path(config._name_or_path).name or config.model_type, tokenizer))
        _add_sizes(writer, config, sizes_in_file(list(layers.values())), dtype, uniform=name == rules.uniform)
        if architecture.layout.experts is not None:
            add_experts(writer, architecture.layout.experts, next(iter(layers.values())), config)
        for add in family.fields:
            add(writer, config)
        embeddings: Any = model.get_input_embeddings()
        add_tokenizer(writer, tokenizer, embeddings.weight.shape[0], pre_tokenizer)
        write_tensors(writer, tensors, dtype)
        writer.close()
        if quantize is not None:
            quantize(unfinished)
        unfinished.replace(file)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
    return file


@dataclass(frozen=True)
class Conversion:
    """What the conversion of a model's tensors depends on.

    Args:
        config (`PreTrainedConfig`): the stock config.
        rules (`GGUFRules`): what llama.cpp can hold of the model's family.
        family (`GGUFFamily`): how its parameters are written.
        layout (`DecoderLayout`): where its layers keep their heads and channels.
        layers (`dict[str, LayerSizes]`): the size of every layer by its name inside the model.
        name (`str`): llama.cpp's name of the architecture.
    """

    config: Any
    rules: GGUFRules
    family: GGUFFamily
    layout: DecoderLayout
    layers: dict[str, LayerSizes]
    name: str


def _rules_of(config: Any, model: PreTrainedModel) -> GGUFRules:
    rules = gguf_rules(config)
    if not model.can_generate():
        raise ValueError(f"GGUF files hold causal language models; this is a {type(model).__name__}.")
    rules.check(config)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context_length(config) and not rules.slides:
        logger.warning(
            "llama.cpp attends to the whole context, and this model to the last %d tokens. Their outputs differ for "
            "longer texts.",
            window,
        )
    return rules


def _name_of(rules: GGUFRules, layers: list[LayerSizes]) -> str:
    skips = next((number for number, layer in enumerate(layers) if not (layer.heads and layer.channels)), None)
    if skips is not None and rules.per_layer is None:
        raise ValueError(
            f"Layer {skips} lacks its attention or its MLP, which llama.cpp's {rules.uniform} cannot hold. Remove "
            f"whole layers: kinds=['layer'] (--kinds layer)."
        )
    differing = next((number for number, layer in enumerate(layers) if layer != layers[0]), skips)
    if differing is None:
        return rules.uniform
    if rules.per_layer is None:
        raise ValueError(
            f"llama.cpp's {rules.uniform} has layers of one size, and layer {differing} differs from layer 0: it has "
            f"{layers[differing]}, and layer 0 has {layers[0]}. Prune the dense model with for_gguf, such as "
            f"for_gguf='q8_0' (--for_gguf q8_0), which prunes every layer alike; a recovery has to be repeated."
        )
    return rules.per_layer


def _check_heads(rules: GGUFRules, layers: list[LayerSizes], config: Any) -> None:
    if not rules.all_heads:
        return
    heads = config.num_attention_heads
    if layers[0].heads != heads:
        units, kind = ("experts", "expert") if layers[0].experts else ("MLPs", "mlp")
        raise ValueError(
            f"llama.cpp's {rules.uniform} computes its width from the number of heads, so that it needs all {heads} "
            f"heads, and this model has {layers[0].heads}. Prune its {units} alone: kinds=['{kind}'] (--kinds {kind})."
        )


def _add_sizes(writer: GGUFWriter, config: Any, layers: list[LayerSizes], dtype: str, uniform: bool) -> None:
    import gguf

    writer.add_block_count(len(layers))
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    values: list[tuple[Callable, list[int]]] = [
        (writer.add_head_count, [layer.heads for layer in layers]),
        (writer.add_head_count_kv, [layer.kv_heads for layer in layers]),
        (writer.add_feed_forward_length, [layer.channels for layer in layers]),
    ]
    for add, counts in values:
        add(counts[0] if uniform else counts)
    writer.add_file_type(getattr(gguf.LlamaFileType, GGUF_TYPES[dtype].file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tensors(model: PreTrainedModel, conversion: Conversion) -> Iterator[GGUFTensor]:
    import gguf

    family, name = conversion.family, conversion.name
    architecture = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, len(conversion.layers))
    # Tied weights are one tensor of the file. Offloaded ones are two parameters of the model.
    tied = getattr(model, "all_tied_weights_keys", {})
    lists = tuple(f"{path}." for path in _lists_of_norms(model, conversion))
    mixtures = tuple(f"{path}." for path in mixture_paths(conversion.layout.experts, conversion.layers))
    for source, parameter in model.named_parameters():
        if source in tied or source.startswith((*lists, *mixtures)):
            continue
        # For some families, gguf lists the names without the prefix of the base model.
        short = source.removeprefix(f"{model.base_model_prefix}.")
        target = names.get_name(source, (".weight", ".bias")) or names.get_name(short, (".weight", ".bias"))
        if target is None or (
            target.endswith(("attn_output.bias", "ffn_down.bias")) and not conversion.rules.output_biases
        ):
            raise ValueError(f"llama.cpp's {name} has no tensor for {source}.")
        # In transformers a parameter may be part of a module that is no linear and no norm.
        target = target if target.endswith((".weight", ".bias")) else f"{target}.weight"
        make = partial(_converted, model, source, conversion)
        shape = tuple(reversed(parameter.shape)) if _is_transposed(model, source) else tuple(parameter.shape)
        yield GGUFTensor(target, shape, make)
        if target == "token_embd.weight" and tied and family.own_output:
            yield GGUFTensor("output.weight", shape, make)
    for path in lists:
        # One tensor of the file has the norms of all heads.
        norms: Any = model.get_submodule(path[:-1])
        target = names.get_name(path.rpartition(".")[0].rpartition(".")[0])
        shape = (len(norms), *norms[0].weight.shape)
        yield GGUFTensor(f"{target}.weight", shape, partial(_stacked, model, path, len(norms)))
    yield from mixture_tensors(model, conversion.layout.experts, conversion.layers)
    yield from stand_ins(list(conversion.layers.values()), conversion.config)
    for target, tensor in rope_tensors(conversion.config).items():
        yield GGUFTensor(target, tuple(tensor.shape), partial(torch.clone, tensor))


def _lists_of_norms(model: PreTrainedModel, conversion: Conversion) -> list[str]:
    """Return the names of lists with a norm for every head."""
    attention = conversion.layout.attention
    norms = [f".{attention.module}.{name}" for name in (attention.query_norms, attention.key_norms) if name]
    names = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return [f"{path}{norm}" for path in conversion.layers for norm in norms if f"{path}{norm}" in names]


def _stacked(model: PreTrainedModel, path: str, heads: int) -> torch.Tensor:
    """Return the weights of a list of norms, `[heads, head_dim]`."""
    return torch.stack([read_parameter(model, f"{path}{head}.weight") for head in range(heads)])


def _is_transposed(model: PreTrainedModel, source: str) -> bool:
    """Whether a parameter is a weight that is stored transposed (GPT-2)."""
    owner, _, name = source.rpartition(".")
    return name == "weight" and isinstance(model.get_submodule(owner), Conv1D)


def _converted(model: PreTrainedModel, source: str, conversion: Conversion) -> torch.Tensor:
    """Return a parameter of the model in llama.cpp's form."""
    sizes = next((sizes for path, sizes in conversion.layers.items() if source.startswith(f"{path}.")), None)
    values = read_parameter(model, source)
    values = values.T if _is_transposed(model, source) else values
    return conversion.family.convert(source, values, sizes, conversion.config, conversion.layout)
