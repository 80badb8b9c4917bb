"""Parts of `gpu.py` on tiny models: every request on the device, beside the same request on the CPU in float32."""

import functools
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from gpu_device import Device
from requests_for_devices import COMMON, REQUESTS

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.forward.losses import next_token_nll
from optimum_fwdprune.loading.offloading import input_device


SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 3}
LAYOUTS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=64, dropout=0.0),
    "bloom": lambda: transformers.BloomConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
}

# What chance decides differently on another device: sampled text, noise of the device's generator, time.
NOT_COMPARABLE = ("self", "mini_llm weights", "target speedup")

# How far a request may be from the same one on the CPU in float32: the smallest share of common units, and the largest
# distance of the logits as a share of their size where all units are the same. Rounding decides between scores that
# nearly tie, which are many in 16 bit where gradients are estimated by forward passes, and where a search turns to.
ALLOWED = {torch.float32: (0.99, 1e-3), torch.float16: (0.85, 0.02), torch.bfloat16: (0.7, 0.1)}
SEARCHED = 0.8

# Requests for models whose layers are offloaded, which cannot be differentiated or timed.
OFFLOADED = (
    "sequential",
    "none",
    "bias",
    "independent",
    "refit sources",
    "flap global",
    "mini_llm weights",
    "mini_llm units",
    "mini_llm ones",
    "policy_gradient ratio",
    "policy_gradient unit",
    "search",
    "rounds",
)
# ... whole models on disk cannot be run so often.
NOT_STREAMED = ("search", "rounds")


def tokens(rows: int, length: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Random tokens that are the same on every device, `[rows, length]` on the CPU."""
    return torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


CALIBRATION = tokens(16, 24, SIZES["vocab_size"], seed=1)
EVALUATION = tokens(16, 24, SIZES["vocab_size"], seed=2)


@functools.cache
def _weights(layout: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(LAYOUTS[layout](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial biases are zero and norms one, which would hide a bias or a norm that is cut wrongly.
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(5)
    return model.state_dict()


def make_model(layout: str, dtype: torch.dtype, device: torch.device | str = "cpu"):
    """A tiny model with the same weights on every device, but for rounding."""
    # Not `.to(dtype)`, which rounds the rotary frequencies that from_pretrained keeps in float32.
    model = transformers.AutoModelForCausalLM.from_config(LAYOUTS[layout](), dtype=dtype)
    model.load_state_dict(_weights(layout))
    model = model.eval().to(device)
    # A device whose tensors are of a class of their own gets new parameters.
    model.tie_weights()
    return model


@torch.no_grad()
def evaluated(model) -> tuple[float, torch.Tensor]:
    """Nats per token of the evaluation tokens, and their logits, float32 on the CPU."""
    logits = model(input_ids=EVALUATION.to(input_device(model)), use_cache=False).logits.float().cpu()
    sums, counts = next_token_nll(logits, EVALUATION)
    return float(sums.sum()) / float(counts.sum()), logits


def prune(pruner: FwdPruner, name: str, calibration: Any = CALIBRATION) -> dict[str, Any]:
    """Carry out a request of the table; returns where the pruned model lies, its loss and its logits."""
    request = PruningConfig(**{**COMMON, **REQUESTS[name]})
    try:
        model = pruner.prune(request, None if name == "self" else calibration)
    except ValueError as error:
        # A tiny model takes the time of its launches, and may be no faster when it is cut.
        if name == "target speedup" and "speed-up" in str(error):
            return {"note": f"refused: {error}"}
        raise
    loss, logits = evaluated(model)
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    return {"loss": loss, "logits": logits, "places": places}


Reference = tuple[dict, dict[str, Any]]


@functools.cache
def reference(layout: str, name: str) -> Reference:
    """The plan on the CPU in float32, and what `prune` returns there."""
    return _reference(layout, name)


def _reference(layout: str, name: str, calibration: Any = CALIBRATION) -> Reference:
    pruner = FwdPruner(make_model(layout, torch.float32))
    result = prune(pruner, name, calibration)
    return pruner.plan.kept, result


def compared(
    pruner: FwdPruner,
    result: dict[str, Any],
    layout: str,
    name: str,
    dtype: torch.dtype,
    wanted: Reference | None = None,
) -> dict[str, Any]:
    """The result with how far it is from the reference; `wrong` says where that is too far."""
    logits = result.pop("logits", None)
    if logits is None:
        return result
    if not logits.isfinite().all():
        return {**result, "wrong": "the logits of the pruned model hold NaN or infinity"}
    if name in NOT_COMPARABLE:
        return result
    kept, expected = wanted or reference(layout, name)
    common = sum(len({*units} & {*pruner.plan.kept[key]}) for key, units in kept.items())
    overlap = common / sum(map(len, kept.values()))
    difference = float((logits - expected["logits"]).norm() / expected["logits"].norm())
    result |= {"overlap": overlap, "logits_difference": difference, "reference_loss": expected["loss"]}
    least, most = ALLOWED[dtype]
    least = min(least, SEARCHED) if name == "search" else least
    if overlap < least or (overlap == 1 and difference > most):
        result["wrong"] = (
            f"{overlap:.1%} of the units are those kept on the CPU in float32 (at least {least:.0%}), and the logits "
            f"differ by {difference:.2g} of their size (at most {most:g} where all units are the same)"
        )
    return result


def request(device: Device, layout: str, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """A request on a model that lies on the device."""
    pruner = FwdPruner(make_model(layout, dtype, device.torch))
    return compared(pruner, prune(pruner, name), layout, name, dtype)


def offloaded(device: Device, placement: str, name: str) -> dict[str, Any]:
    """A request on a model parts of which lie elsewhere and compute on the device."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pruner = PLACEMENTS[placement](device, folder)
        return compared(pruner, prune(pruner, name), "llama", name, torch.bfloat16)


def _mapped(place: Callable[[Device], str]):
    def make(device: Device, folder: str) -> FwdPruner:
        from accelerate import dispatch_model

        model, first = make_model("llama", torch.bfloat16), device.name
        where = {name: first for name, _ in model.named_children() if name != "model"}
        where |= {f"model.{name}": first for name, _ in model.model.named_children() if name != "layers"}
        where |= {"model.layers.0": first, "model.layers.1": place(device), "model.layers.2": place(device)}
        return FwdPruner(dispatch_model(model, where, main_device=first, offload_dir=folder, force_hooks=True))

    return make


def _cpu_offload(device: Device, _folder: str) -> FwdPruner:
    from accelerate import cpu_offload

    return FwdPruner(cpu_offload(make_model("llama", torch.bfloat16), device.torch))


def _disk_offload(device: Device, folder: str) -> FwdPruner:
    from accelerate import disk_offload

    return FwdPruner(disk_offload(make_model("llama", torch.bfloat16), folder, device.torch))


def _low_memory(_device: Device, folder: str) -> FwdPruner:
    make_model("llama", torch.bfloat16).save_pretrained(f"{folder}/dense")
    return FwdPruner.from_pretrained(f"{folder}/dense", low_memory=True, offload_folder=folder)


PLACEMENTS: dict[str, Callable[[Device, str], FwdPruner]] = {
    "layers on cpu": _mapped(lambda device: "cpu"),
    "layers on disk": _mapped(lambda device: "disk"),
    "cpu_offload": _cpu_offload,
    "disk_offload": _disk_offload,
    "low_memory": _low_memory,
    "two devices": _mapped(lambda device: str(device.other())),
}


def placements(device: Device) -> list[str]:
    """What can be tried: two devices where there are two."""
    return [name for name in PLACEMENTS if name != "two devices" or device.count > 1]


def device_map_auto(device: Device) -> dict[str, Any]:
    """A checkpoint that transformers places itself, pruned and saved, and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        make_model("llama", torch.bfloat16).save_pretrained(f"{folder}/dense")
        pruner = FwdPruner.from_pretrained(f"{folder}/dense", device_map="auto" if not device.is_cpu else "cpu")
        result = prune(pruner, "sequential")
        pruner.save_pretrained(f"{folder}/pruned")
        again = FwdPruner.from_pretrained(f"{folder}/pruned", device_map=str(device.torch)).model
        loaded, _ = evaluated(again)
    if not abs(loaded - result["loss"]) < 1e-3:
        result["wrong"] = f"the loss is {result['loss']:.6f} before saving and {loaded:.6f} after loading"
    return compared(pruner, result, "llama", "sequential", torch.bfloat16)


def padded(device: Device) -> dict[str, Any]:
    """Calibration windows of several lengths, padded on the left."""
    lengths = torch.arange(len(CALIBRATION)) % 12 + CALIBRATION.shape[1] - 11
    mask = (torch.arange(CALIBRATION.shape[1]) >= CALIBRATION.shape[1] - lengths[:, None]).long()
    calibration = {"input_ids": CALIBRATION * mask, "attention_mask": mask}
    pruner = FwdPruner(make_model("llama", torch.float32, device.torch))
    result = prune(pruner, "refit sources", calibration)
    wanted = _reference("llama", "refit sources", calibration)
    return compared(pruner, result, "llama", "refit sources", torch.float32, wanted)


def repeated(device: Device) -> dict[str, Any]:
    """The same request twice: whether weights are the same to the bit, with tokens on the device the second time."""
    weights = []
    for calibration in (CALIBRATION, CALIBRATION.to(device.torch)):
        pruner = FwdPruner(make_model("llama", torch.bfloat16, device.torch))
        model = pruner.prune(PruningConfig(**{**COMMON, **REQUESTS["refit sources"]}), calibration)
        weights.append({name: value.cpu() for name, value in model.state_dict().items()})
    first, second = weights
    if [value.shape for value in first.values()] != [value.shape for value in second.values()]:
        return {"wrong": "the two plans differ"}
    furthest = max(float((first[name].float() - second[name].float()).abs().max()) for name in first)
    return {"note": f"largest difference of a weight: {furthest:.3g}"}


def random_state(device: Device) -> dict[str, Any]:
    """Whether pruning leaves the random state of the CPU and of the device as it was."""
    for name in ("self", "mini_llm weights", "policy_gradient ratio", "random"):
        # Models are made with a seed.
        model = make_model("llama", torch.bfloat16, device.torch)
        torch.manual_seed(0)
        before = device.random_states()
        FwdPruner(model).prune(PruningConfig(**{**COMMON, **REQUESTS[name]}), None if name == "self" else CALIBRATION)
        if not all(map(torch.equal, before, device.random_states())):
            return {"wrong": f"the request {name!r} changed the random state of the process"}
    return {}
