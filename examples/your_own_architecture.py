"""A family of your own: Granite, which this package does not know, in forty lines, pruned and loaded again.

    python examples/your_own_architecture.py ibm-granite/granite-3.1-2b-base pruned

Granite's layers are shaped like LLaMA's. tests/third_party_phi3.py is a family with fused projections.
"""

import argparse
import sys

from huggingface_hub.dataclasses import strict
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, GraniteModel

from optimum_fwdprune import Architecture, AttentionLayout, FwdPruner, MLPLayout, PruningConfig, register_architecture
from optimum_fwdprune.models.per_layer import PerLayerMixin, resize_llama_layer


@strict
class PrunedGraniteConfig(GraniteConfig):
    model_type = "pruned_granite"

    attention_output_bias: bool = False
    mlp_output_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        # The width of a head, which the stock config derives from a number of heads that now differs by layer.
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class PrunedGraniteMixin(PerLayerMixin):
    config_class = PrunedGraniteConfig
    resize = staticmethod(resize_llama_layer)


class PrunedGraniteModel(PrunedGraniteMixin, GraniteModel):
    pass


class PrunedGraniteForCausalLM(PrunedGraniteMixin, GraniteForCausalLM):
    pass


def register():
    attention = AttentionLayout(module="self_attn", query="q_proj", key="k_proj", value="v_proj", output="o_proj")
    mlp = MLPLayout(sources=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj")
    register_architecture(Architecture.from_module("granite", attention, mlp, sys.modules[__name__]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="A Granite model: folder or repository.")
    parser.add_argument("output", help="Folder for the pruned checkpoint.")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--calibration", help="A text file or dataset; WikiText-2 by default.")
    args = parser.parse_args()

    register()
    pruner = FwdPruner.from_pretrained(args.model)
    # Should layout and resize() disagree, prune() says so: it compares the logits of masked and sliced model.
    pruner.prune(PruningConfig(sparsity=args.sparsity, scope="global", calibration=args.calibration))
    pruner.save_pretrained(args.output)
    print(pruner.report)
    print(type(AutoModelForCausalLM.from_pretrained(args.output)).__name__, "loads.")


if __name__ == "__main__":
    # As a module: its file is copied beside the weights, which load with trust_remote_code=True; a script's is not.
    from your_own_architecture import main as main_of_the_module

    main_of_the_module()
