"""Parts of `gpu.py` on models of real shapes with random weights: what pruning takes, and what pruned models save."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from gpu_device import Device
from gpu_requests import tokens

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.evaluation import benchmark


LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
LLAMA_3_8B = {
    **LLAMA_2_7B,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
SHAPES = {"LLaMA-2-7B": LLAMA_2_7B, "Llama-3-8B": LLAMA_3_8B}
# For trying the script: everything that says how large the model is.
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "max_position_embeddings": 256}

# What a card of 24 GB leaves to a process, in GiB.
SMALL_CARD = 23.0
SPARSITY = 0.2
SPARSITIES = (0.0, 0.2, 0.4, 0.5)


class LargeParts:
    """Runs parts on one device; `tiny` replaces the shapes and sizes by ones that a CPU takes a second for."""

    def __init__(self, device: Device, tiny: bool):
        self._device = device
        self._tiny = tiny
        self.windows, self.window = (4, 32) if tiny else (16, 2048)
        self.prompt, self.new_tokens, self.repeats = (16, 4, 2) if tiny else (512, 128, 3)

    def make_model(self, shape: str) -> transformers.PreTrainedModel:
        """A model of random bfloat16 weights, drawn on the device."""
        sizes = {**SHAPES[shape], **TINY} if self._tiny else SHAPES[shape]
        if self._tiny and "num_key_value_heads" in sizes:
            sizes["num_key_value_heads"] = 2
        torch.manual_seed(0)
        with self._device.torch:
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(**sizes), dtype=torch.bfloat16
            )
        return model.eval()

    def prune(self, shape: str, preset: str, limit: float | None = None) -> dict[str, Any]:
        """Prune by a preset: seconds and peak memory of every stage.

        Args:
            limit (`float`, *optional*): GiB of the device's memory that this process may have.
        """
        request = PruningConfig.from_preset(preset, sparsity=SPARSITY)
        peaks: dict[str, int] = {}
        result: dict[str, Any] = {"peaks": peaks}
        with self._device.limited_memory(limit) as limited:
            if limit is not None:
                result["limit_gib"] = limit if limited else None
            pruner = FwdPruner(self.make_model(shape))
            calibration = tokens(self.windows, self.window, pruner.model.config.vocab_size, seed=1)
            result["tokens"] = calibration.numel()
            try:
                with self._device.peaks_by_stage(peaks):
                    pruner.prune(request, calibration)
            except Exception as error:
                # The stages that were reached, the one that failed last.
                error.measured = result  # type: ignore[attr-defined]
                raise
        report = pruner.report
        return result | {
            "seconds_by_stage": report.seconds,
            "removed": report.removed_parameters / report.prunable_parameters,
            "masked_difference": report.masked_difference,
        }

    def speed(self, sparsity: float) -> dict[str, Any]:
        """Prefill of one prompt and greedy decoding after it, of a model that lost heads and channels alike."""
        pruner = FwdPruner(self.make_model("LLaMA-2-7B"))
        if sparsity:
            pruner.prune(self._plain(sparsity=sparsity))
        (measured,) = benchmark(
            [pruner.model], prompt_tokens=[self.prompt], new_tokens=self.new_tokens, repeats=self.repeats
        )
        timing = measured.timings[0]
        return {
            "sparsity": sparsity,
            "parameters": measured.parameters,
            "macs_per_token": measured.macs_per_token,
            "prefill": vars(timing.prefill),
            "decode": vars(timing.decode),
            "model_peak_bytes": measured.peak_bytes,
        }

    def speedup(self, asked: float) -> dict[str, Any]:
        """Whether a model that was pruned to be faster is as fast as the latencies of its layers said."""
        pruner = FwdPruner(self.make_model("LLaMA-2-7B"))
        try:
            pruner.prune(self._plain(target_speedup=asked, latency_tokens=self.prompt))
        except ValueError as error:
            if self._tiny and "speed-up" in str(error):
                return {"note": f"refused: {error}"}
            raise
        speedup = pruner.report.speedup
        return {"asked": asked, "predicted": speedup.predicted, "measured": speedup.measured}

    def _plain(self, **budget: float) -> PruningConfig:
        return PruningConfig(
            method="magnitude",
            reconstruction="none",
            kinds=["attention", "mlp"],
            skip_layers=[],
            multiple_of=8 if self._tiny else 128,
            **budget,
        )


# Name -> (seconds that it takes at most on one H100, what runs it), the most informative first.
def pruning_parts(large: LargeParts) -> dict[str, tuple[float, Callable[[], dict[str, Any]]]]:
    """Presets on both shapes, with all memory and with that of a small card."""
    seconds = {"fast": 25.0, "balanced": 40.0, "best": 80.0}
    order = [
        ("LLaMA-2-7B", "balanced", None),
        ("LLaMA-2-7B", "balanced", SMALL_CARD),
        ("LLaMA-2-7B", "best", SMALL_CARD),
        ("LLaMA-2-7B", "best", None),
        ("Llama-3-8B", "balanced", SMALL_CARD),
        ("LLaMA-2-7B", "fast", SMALL_CARD),
        ("Llama-3-8B", "best", SMALL_CARD),
        ("LLaMA-2-7B", "fast", None),
        ("Llama-3-8B", "fast", SMALL_CARD),
        ("Llama-3-8B", "balanced", None),
        ("Llama-3-8B", "fast", None),
        ("Llama-3-8B", "best", None),
    ]
    return {
        f"{shape}, {preset}{f', {limit:g} GiB' if limit else ''}": (
            seconds[preset],
            lambda shape=shape, preset=preset, limit=limit: large.prune(shape, preset, limit),
        )
        for shape, preset, limit in order
    }


def speed_parts(large: LargeParts) -> dict[str, tuple[float, Callable[[], dict[str, Any]]]]:
    """The 7B shape at several sparsities, and one target of speed."""
    parts: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {
        f"sparsity {sparsity:g}": (25.0, lambda sparsity=sparsity: large.speed(sparsity)) for sparsity in SPARSITIES
    }
    return parts | {"target_speedup 1.2": (30.0, lambda: large.speedup(1.2))}
