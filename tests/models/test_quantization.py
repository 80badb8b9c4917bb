"""Quantize after pruning: what loads a checkpoint in fewer bits loads a pruned one."""

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from optimum_fwdprune import FwdPruner


# Widths that the kernels take: bitsandbytes' blocks of 4-bit weights hold 64 of a row on a CPU.
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose layers differ, with widths that are multiples of 64."""
    folder = tmp_path_factory.mktemp("quantization") / "pruned"
    tokens = torch.randint(0, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))
    pruner = FwdPruner(tiny.make_model("llama_mha_tied", dtype=torch.bfloat16, num_hidden_layers=4, **SIZES))
    pruner.prune(tiny.request(sparsity=0.4, scope="global", kinds=["mlp"], multiple_of=64), tokens)
    assert len({len(units) for (_, kind), units in pruner.plan.kept.items() if kind == "mlp"}) > 1
    pruner.save_pretrained(folder)
    return folder


def difference(model, other, tokens):
    """The largest difference of logits, as a share of their scale."""
    with torch.no_grad():
        logits, others = (each(tokens).logits.float() for each in (model, other))
    return float((logits - others).abs().max() / others.abs().max())


@pytest.mark.parametrize(
    ("library", "config", "tolerance"),
    [
        ("torchao", lambda: TorchAoConfig(_int8()), 0.1),
        ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), 0.15),
        ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 1.0),
    ],
    ids=["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"],
)
def test_a_pruned_checkpoint_loads_quantized(folder, tokens, library, config, tolerance):
    # torchao is not among the tests' packages: where it is installed, every import of transformers takes it along.
    pytest.importorskip(library, reason=f"{library} is not installed")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config(), device_map="cpu"
    )
    broken = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in broken.model.layers.parameters():
            parameter.zero_()

    assert type(quantized) is type(plain)
    weight = quantized.model.layers[0].mlp.down_proj.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype is torch.uint8
    assert 0 < difference(quantized, plain, tokens) < tolerance
    assert difference(quantized, plain, tokens) < 0.7 * difference(broken, plain, tokens)


def _int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()
