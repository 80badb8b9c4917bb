"""Models and requests that cannot be pruned, each with an error that names what is wrong."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner


@pytest.mark.parametrize("method", ["wanda_sp", "random"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named_by_parameter(dense, tokens, method, bad):
    name, parameter = next((n, p) for n, p in dense.named_parameters() if ".1." in n)
    parameter.data.view(-1)[0] = bad
    with pytest.raises(ValueError, match=f"{name} contains NaN or infinity"):
        FwdPruner(dense).prune(tiny.request(method=method), tokens)


def test_bad_activations_are_named_by_layer(dense, tokens):
    """Weights are finite, but layer 1 overflows in float16."""
    model = dense.to(torch.float16)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))

    def overflow(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden * float("inf")
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = layers[1].register_forward_pre_hook(overflow, with_kwargs=True)
    with pytest.raises(ValueError, match=r"activations before .*\.1\..* \(attention of layer 1\) contain NaN"):
        FwdPruner(model).prune(tiny.request(kinds=["attention", "mlp"]), tokens)
    handle.remove()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparsity": 0.99}, r"Removing 0\.99 .* min_units_per_site=1: the largest possible sparsity is 0\.\d+"),
        ({"sparsity": 0.5, "min_units_per_site": 60}, r"min_units_per_site=60: the largest possible sparsity is 0"),
        ({"sparsity": 0.5, "skip_layers": [0, 1, 2]}, r"skip_layers=\[0, 1, 2\]: the largest possible sparsity is 0"),
        ({"sparsity": 0.8, "kinds": ["mlp"]}, r"kinds=\['mlp'\]: the largest possible sparsity is"),
        ({"sparsity": 0.95, "multiple_of": 32}, r"multiple_of=32: the largest possible sparsity is"),
        ({"target_parameters": 1000}, "the largest possible sparsity is"),
        ({"target_parameters": 10**9}, "target_parameters is 1,000,000,000, and the model has only"),
        ({"target_bytes": 10**9}, "target_bytes is 1,000,000,000, and the model has only"),
        ({"skip_layers": [3]}, "skip_layers names layer 3; the model has layers 0 to 2"),
    ],
)
def test_an_impossible_request_names_the_constraint_and_changes_nothing(config, message, tokens):
    model = tiny.make_model("llama_gqa_biases")
    before = model(tokens).logits
    with pytest.raises(ValueError, match=message):
        FwdPruner(model).prune(tiny.request(**config), tokens)

    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(*tiny.crossed(scope=["layer", "global"], reconstruction=["none", "bias"]))
def test_targets_are_ceilings_of_the_whole_model(dense, tokens, scope, reconstruction, tmp_path):
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    target = int(parameters * 0.75)
    config = {"scope": scope, "reconstruction": reconstruction}
    pruned = FwdPruner(dense).prune(tiny.request(target_parameters=target, **config), tokens, inplace=False)
    left = sum(parameter.numel() for parameter in pruned.parameters())
    layers = 3 if scope == "layer" else 1

    assert target - layers * 1000 < left <= target

    pruner = FwdPruner(dense)
    pruner.prune(tiny.request(target_bytes=4 * target, **config), tokens)
    pruner.save_pretrained(tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_size

    assert 4 * target - 40_000 < written <= 4 * target


@pytest.mark.parametrize("pruned_before", [False, True])
def test_the_largest_sparsity_that_an_error_names_is_possible(dense, tokens, pruned_before):
    model = dense
    if pruned_before:
        model = FwdPruner(dense).prune(tiny.request(sparsity=0.2), tokens)
    with pytest.raises(ValueError, match="largest possible sparsity is") as error:
        FwdPruner(model).prune(tiny.request(sparsity=0.999), tokens)
    possible = float(str(error.value).partition("sparsity is ")[2].partition(". Reduce")[0])
    pruner = FwdPruner(model)
    pruner.prune(tiny.request(sparsity=possible, reconstruction="none"), tokens)

    assert pruner.report.sparsity == pytest.approx(possible, abs=0.05)


def test_every_setting_of_the_mlp_width_is_a_multiple(dense, tokens):
    for scope in ("layer", "global"):
        pruner = FwdPruner(dense)
        pruner.prune(tiny.request(sparsity=0.3, scope=scope, multiple_of=16), tokens, inplace=False)

        assert all(len(kept) % 16 == 0 for (_, kind), kept in pruner.plan.kept.items() if kind == "mlp")


def test_skipped_layers_are_whole(dense, tokens):
    pruner = FwdPruner(dense)
    pruner.prune(tiny.request(sparsity=0.2, skip_layers=[0, -1]), tokens)

    for (layer, kind), kept in pruner.plan.kept.items():
        assert layer == 1 or len(kept) == pruner.plan.num_units[(layer, kind)]
    assert pruner.report.sparsity == pytest.approx(0.2, abs=0.02)


def test_a_model_on_the_meta_device_is_refused(tokens):
    with torch.device("meta"):
        model = tiny.make_model("llama_gqa_biases")
    with pytest.raises(ValueError, match="on the meta device and has no weights"):
        FwdPruner(model).prune(None, tokens)


def test_zero_sparsity_prunes_nothing_and_changes_nothing(dense, tokens):
    before = dense(tokens).logits
    pruner = FwdPruner(dense)
    pruned = pruner.prune(tiny.request(sparsity=0.0), tokens)

    assert pruner.report.removed_parameters == 0
    assert torch.equal(pruned(tokens).logits, before)
