"""`benchmarks/latency_llama_cpp.py`: tables of latencies from times of whole models."""

import sys
from pathlib import Path

import pytest
import tiny

from optimum_fwdprune import FwdPruner, PruningConfig


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import latency_llama_cpp
    finally:
        sys.path.remove(folder)
    return latency_llama_cpp


@pytest.mark.parametrize(
    ("kinds", "without_sublayers"), [(["layer"], True), (["sublayer", "mlp"], True), (["mlp"], False)]
)
def test_differences_of_whole_models_are_those_of_layers(script, kinds, without_sublayers, tokens, tmp_path):
    """Every parameter takes a nanosecond, whether or not the program runs layers without sublayers."""
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=5)

    def seconds(plan):
        layers = [[key for key in plan.kept if key.layer == layer] for layer in range(5)]
        partly = any(len([key for key in of_layer if plan.kept[key]]) == 1 for of_layer in layers)
        if partly and not without_sublayers:
            return None
        pruner = FwdPruner(model)
        pruner.prune(plan=plan, reconstruction="none", inplace=False)
        size = sum(parameter.numel() for parameter in pruner.model.parameters())
        return {"prefill": 1e-9 * size, "decode": 2e-9 * size}

    file = tmp_path / "table.json"
    script.table_of(model, seconds, {"device": "a server"}, {"prefill": 16, "decode": 16}).save(file)
    pruner = FwdPruner(model)
    own = {"method": "random"} if kinds == ["layer"] else {"method": "magnitude"}
    mixed = {"depth_sparsity": 0.2, "depth_method": "random"} if len(kinds) == 2 else {}
    request = PruningConfig(
        **own,
        **mixed,
        kinds=kinds,
        target_speedup=1.4,
        speed_of="decode",
        latency_tokens=16,
        latency_table=str(file),
        reconstruction="none",
    )
    pruner.prune(request, tokens)
    speedup = pruner.report.speedup
    exact = pruner.report.parameters_before / pruner.report.parameters_after
    assert speedup.measured is None and speedup.predicted == pytest.approx(exact, rel=0.01)


def test_tables_are_filled_by_llama_cpp(script, tmp_path):
    pytest.importorskip("xllamacpp")
    model, tokenizer = tiny.make_model("llama_mha_tied", num_hidden_layers=2), tiny.make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "table.json"
    options = ["--dtype", "f32", "--tokens", "16", "--widths", "1", "--repeats", "1", "--threads", "1"]
    script.main([str(tmp_path / "model"), str(file), *options])
    pruner = FwdPruner.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="latency_tokens=16, and this request is for latency_tokens=8"):
        pruner.prune(target_speedup=1.1, latency_tokens=8, latency_table=str(file))
