"""`optimum-cli fwdprune export`, and `prune --layout stock` before it."""

import pytest
import tiny
import torch
import transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A dense checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    tiny.make_model("llama_mqa").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return folder


BOTH = ["--kinds", "attention", "mlp"]
SMALL = ["--calibration", "builtin", "--n_samples", "4", "--seq_len", "32"]


def test_a_stock_layout_is_pruned_and_exported(cli, folder, tokens, tmp_path):
    code, _, err = cli("prune", "-m", folder / "dense", tmp_path / "pruned", "--layout", "stock", *BOTH, *SMALL)
    assert code == 0, err
    code, out, err = cli("export", tmp_path / "pruned", tmp_path / "stock", "--format", "stock")

    assert code == 0, err
    assert f"Written to {tmp_path / 'stock'}" in out
    pruned, stock = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("pruned", "stock")
    )
    # Five heads of 8 do not divide 48.
    assert type(stock) is transformers.MistralForCausalLM
    assert torch.equal(pruned(tokens).logits, stock(tokens).logits)
    assert (tmp_path / "stock" / "tokenizer.json").exists()
    code, _, err = cli("export", tmp_path / "pruned", tmp_path / "stock")
    assert code == 1 and "is not empty" in err


def test_uneven_layers_are_refused_in_one_line(cli, folder, tmp_path):
    code, _, err = cli("prune", "-m", folder / "dense", tmp_path / "pruned", "--scope", "global", *SMALL)
    assert code == 0, err
    code, _, err = cli("export", tmp_path / "pruned", tmp_path / "stock")
    lines = [line for line in err.splitlines() if line.startswith("error")]

    assert code == 1 and len(lines) == 1 and "--layout stock" in lines[0] and "Traceback" not in err
    assert not (tmp_path / "stock").exists()
