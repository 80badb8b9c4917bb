"""A family of your own: VaultGemma, which this package does not know, in thirty lines, pruned and loaded again.

    python examples/your_own_architecture.py google/vaultgemma-1b pruned

VaultGemma's layers are shaped like LLaMA's. tests/third_party_persimmon.py declares a family with fused projections.
"""

import argparse
import sys

from huggingface_hub.dataclasses import strict
from transformers import AutoModelForCausalLM, VaultGemmaConfig, VaultGemmaForCausalLM, VaultGemmaModel

from optimum_fwdprune import Architecture, FwdPruner, PruningConfig, register_architecture
from optimum_fwdprune.models.layout import LLAMA_LAYOUT
from optimum_fwdprune.models.per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedVaultGemmaConfig(PerLayerConfigMixin, VaultGemmaConfig):
    model_type = "pruned_vaultgemma"


class PrunedVaultGemmaMixin(PerLayerMixin):
    config_class = PrunedVaultGemmaConfig
    # The modules have the names that LLaMA's have.
    layout = LLAMA_LAYOUT


class PrunedVaultGemmaModel(PrunedVaultGemmaMixin, VaultGemmaModel):
    pass


class PrunedVaultGemmaForCausalLM(PrunedVaultGemmaMixin, VaultGemmaForCausalLM):
    pass


def register():
    register_architecture(Architecture.from_module(sys.modules[__name__]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="A VaultGemma model: folder or repository.")
    parser.add_argument("output", help="Folder for the pruned checkpoint.")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--calibration", help="A text file or dataset; WikiText-2 by default.")
    args = parser.parse_args()

    register()
    pruner = FwdPruner.from_pretrained(args.model)
    # Should the layout be wrong, prune() reports it: it compares the logits of the masked and the sliced model.
    pruner.prune(PruningConfig(sparsity=args.sparsity, scope="global", calibration=args.calibration))
    pruner.save_pretrained(args.output)
    print(pruner.report)
    print(type(AutoModelForCausalLM.from_pretrained(args.output)).__name__, "loads.")


if __name__ == "__main__":
    # As a module: its file is copied beside the weights, which load with trust_remote_code=True; a script's is not.
    from your_own_architecture import main as main_of_the_module

    main_of_the_module()
