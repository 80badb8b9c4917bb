"""How many tokens a model has positions for."""

import pytest
import tiny
import tiny_multimodal
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.architectures.positions import check_length, positions_of
from optimum_fwdprune.evaluation import text_loss
from optimum_fwdprune.recovery import RecoveryArguments


@pytest.mark.parametrize(("name", "expected"), [("llama_mqa", 128), ("gpt2", 128), ("bloom", None)])
def test_positions_of_configs(name, expected):
    assert positions_of(tiny.make_config(name)) == expected


def test_a_longer_sequence_is_refused():
    config = tiny.make_config("llama_mqa")
    check_length(128, config)
    check_length(10**6, tiny.make_config("bloom"))
    with pytest.raises(ValueError, match="seq_len=129 is more than the 128 positions of the model"):
        check_length(129, config, "seq_len")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_multimodal_models_have_the_positions_of_their_text_model(mode, tmp_path):
    model = tiny_multimodal.make_model("gemma3")
    tokens = torch.arange(400) % 200
    assert positions_of(model.config) == 128
    with pytest.raises(ValueError, match="max_length=129 is more than the 128 positions"):
        text_loss(model, tokens, max_length=129)
    pruner = FwdPruner(model)
    pruner.prune(method="magnitude", reconstruction="none", sparsity=0.2)
    args = RecoveryArguments(
        tmp_path / "training", mode=mode, max_length=129, max_steps=1, use_cpu=True, save_strategy="no"
    )
    with pytest.raises(ValueError, match="max_length=129 is more than the 128 positions"):
        pruner.recover({"input_ids": tokens.view(4, 100).tolist()}, args)
