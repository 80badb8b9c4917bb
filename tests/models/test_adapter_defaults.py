"""PEFT puts adapters on pruned models as on the stock family, whichever of the two packages is imported first."""

import peft
import pytest
import tiny
from peft.utils import constants
from transformers import configuration_utils

from optimum_fwdprune import FwdPruner


CUT = {"method": "magnitude", "kinds": ["attention", "mlp"], "reconstruction": "none", "sparsity": 0.4}
FAMILIES = ["bloom", "llama", "mistral", "opt", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", ["llama_gqa_biases", "opt_pre_norm", "bloom", "qwen3"])
@pytest.mark.parametrize("config", [peft.LoraConfig, peft.IA3Config, peft.VeraConfig])
def test_target_modules_need_no_name(name, config):
    stock = tiny.make_model(name)
    pruned = FwdPruner(tiny.make_model(name)).prune(**CUT)

    def adapted(model):
        try:
            wrapped = peft.get_peft_model(model, config(task_type="CAUSAL_LM"))
        except ValueError as error:
            return str(error)
        return sorted(wrapped.targeted_module_names)

    # PEFT has no defaults of some methods for some families.
    assert adapted(pruned) == adapted(stock)


def test_saving_adapters_reads_the_dense_config_without_a_warning(tmp_path, monkeypatch):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    pruner = FwdPruner.from_pretrained(tmp_path / "dense")
    adapted = peft.get_peft_model(pruner.prune(**CUT), peft.LoraConfig(task_type="CAUSAL_LM"))
    warnings = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda *message: warnings.append(message))
    adapted.save_pretrained(tmp_path / "adapters")

    assert warnings == []
    # The config that PEFT reads is a pruned one that lost nothing.
    read = type(pruner.model.config).from_pretrained(tmp_path / "dense")
    assert read.model_type == "pruned_llama" and read.vocab_size == tiny.VOCAB


@pytest.mark.parametrize("family", FAMILIES)
def test_every_table_has_the_pruned_family_where_it_has_the_stock_one(family):
    tables = {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    assert len(tables) > 10
    for name, table in tables.items():
        assert table.get(f"pruned_{family}") == table.get(family), name


@pytest.mark.parametrize(
    "first",
    [
        "import optimum_fwdprune; assert 'peft' not in sys.modules; import peft",
        "from optimum_fwdprune import FwdPruner; assert 'peft.utils.constants' not in sys.modules; import peft",
    ],
)
def test_the_order_of_imports_does_not_matter(first, fresh_processes):
    code = (
        f"import sys; {first}; from transformers import AutoModelForCausalLM\n"
        "from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table\n"
        f"assert all(table['pruned_' + name] == table[name] for name in {FAMILIES})\n"
    )
    result = fresh_processes.run(code)
    assert result.returncode == 0, result.stderr[-2000:]
