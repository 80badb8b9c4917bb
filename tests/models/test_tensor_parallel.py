"""Two processes that share the layers of a pruned model compute what one does, with gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_mixtures
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.export import export_stock


SCRIPT = Path(__file__).parents[1] / "scripts" / "split_over_devices.py"
DEVICES = 2
# Seconds; it takes a dozen. Processes that wait for each other never end.
LONGEST_LAUNCH = 240

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6}
GROUPS = {"attention_unit": "kv_group", "scope": "global", "tensor_parallel": DEVICES}
# Layers of different sizes, with separate and with fused sources and gates; layers without attention or MLP; biases
# that the dense model lacks.
PRUNED = {
    "llama": ("llama_gqa_biases", HEADS, GROUPS),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 12, "hidden_size": 96}, GROUPS),
    "sublayers": ("llama_gqa_biases", HEADS, {"kinds": ["sublayer"], "tensor_parallel": DEVICES}),
    "biases": ("mistral_sliding_window", HEADS, {**GROUPS, "reconstruction": "bias"}),
}
MIXTURE = {"kinds": ["expert", "attention"], "attention_unit": "kv_group", "tensor_parallel": DEVICES}
NAMES = [*PRUNED, "mixtral", "alike", "stock"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and beside the weights what two processes computed with them."""
    folder = tmp_path_factory.mktemp("devices")
    tokens = torch.randint(0, tiny.VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, folder / "inputs.safetensors")
    uneven = {"uneven": ("llama_gqa_biases", HEADS, {**GROUPS, "tensor_parallel": 1, "sparsity": 0.5})}
    alike = {"alike": ("llama_gqa_biases", HEADS, {"layout": "stock", "tensor_parallel": DEVICES})}
    for name, (architecture, changes, fields) in {**PRUNED, **uneven, **alike}.items():
        request = {"method": "random", "sparsity": 0.4, "seed": 3, "reconstruction": "none", **fields}
        pruner = FwdPruner(tiny.make_model(architecture, **changes))
        pruner.prune(tiny.request(**request), tokens)
        pruner.save_pretrained(folder / name)
    export_stock(pruner.model, None, folder / "stock")
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral", num_key_value_heads=4))
    pruner.prune(None, tokens, method="magnitude", reconstruction="none", sparsity=0.5, **MIXTURE)
    pruner.save_pretrained(folder / "mixtral")
    launch(folder)
    return folder


def launch(folder):
    """Start the processes as torchrun would, without the time that it takes itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(DEVICES)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder], env={**environment, "RANK": rank, "LOCAL_RANK": rank}, **pipes
        )
        for rank in map(str, range(DEVICES))
    ]
    try:
        outputs = [process.communicate(timeout=LONGEST_LAUNCH)[0] for process in processes]
    finally:
        # One whose fellow has failed waits for it.
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * DEVICES, "\n".join(outputs)[-3000:]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_two_devices_compute_what_one_does(folder, name):
    tokens = load_file(folder / "inputs.safetensors")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    generated = model.generate(tokens[:1, :6], max_new_tokens=6, do_sample=False, pad_token_id=0)

    assert type(model).__name__.startswith("Pruned") == (name != "stock")
    for rank in range(DEVICES):
        outputs = load_file(folder / name / f"outputs-{rank}")
        torch.testing.assert_close(outputs["logits"], model(tokens).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(outputs["generated"], generated)


@pytest.mark.parametrize("name", NAMES)
def test_every_device_has_its_half_of_every_layer(folder, name):
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    shares = [load_file(folder / name / f"weights-{rank}") for rank in range(DEVICES)]
    split = [each for each in shares[0] if each.endswith(("o_proj.weight", "dense.weight", "down_proj"))]
    split += [each for each in shares[0] if each.endswith(("down_proj.weight", "dense_4h_to_h.weight"))]

    assert len(split) >= (4 if name == "sublayers" else 6)
    for parameter in split:
        whole = model.get_parameter(parameter)
        assert torch.equal(torch.cat([share[parameter] for share in shares], dim=-1), whole)
        assert shares[0][parameter].shape == shares[1][parameter].shape


def test_layers_of_different_sizes_are_among_them(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    sizes = {(layer.self_attn.k_proj.out_features, layer.mlp.up_proj.out_features) for layer in model.model.layers}

    assert len(sizes) == 3


def test_kv_heads_that_devices_cannot_share_are_refused_with_the_layer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "uneven")
    counts = [layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in model.model.layers]
    layer = next(number for number, count in enumerate(counts) if count % DEVICES)
    message = (
        f"ValueError: Tensor parallelism splits every layer over 2 devices, and layer {layer} has {counts[layer]} KV "
        f"heads, which 2 does not divide. Numbers of devices that divide those of all layers: 1. Load it on so many, "
        f"or prune the dense model with tensor_parallel=2."
    )

    assert all((folder / "uneven" / f"error-{rank}").read_text() == message for rank in range(DEVICES))
