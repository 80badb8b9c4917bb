"""Least squares across layers and sublayers that are gone."""

import copy

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from optimum_fwdprune import FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.reconstruction.joining import output_before_norm


GAPS = {
    "first layer": [0],
    "inner layers": [1, 2],
    "last layer": [3],
    "last attention": [(3, "attention")],
    "mlp and attention": [(1, "mlp"), (2, "attention")],
}
# Their random models have enough in common between tokens for held-out windows to gain.
ARCHITECTURES = ("llama_gqa_biases", "opt_pre_norm", "bloom")
# Norms follow their projections.
NORMALIZED = ("gemma3_text", "olmo2")
LAYERS = {"opt_pre_norm": "decoder.layers", "bloom": "h"}


def deep_model(name):
    """A model of four layers."""
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3_text" else {}
    return tiny.make_model(name, num_hidden_layers=4, **types)


def plan_without(model, gone):
    sites = find_sites(model)
    counts = {site.key: site.num_units for site in sites}
    kept = {key: [] if key.layer in gone or key in gone else list(range(count)) for key, count in counts.items()}
    return PruningPlan(kept, counts, model.config.model_type, "query_head")


def pruned_by(model, plan, tokens, **fields):
    pruner = FwdPruner(copy.deepcopy(model))
    pruner.prune(plan=plan, dataset=tokens, **{"reconstruction": "least_squares", **fields})
    return pruner


@torch.no_grad()
def stream_after(model, name, layer, tokens):
    """What a layer returns, `[tokens, hidden]` float64."""
    seen = []
    module = model.base_model.get_submodule(LAYERS.get(name, "layers"))[layer]
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(tokens)
    handle.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return output.flatten(0, -2).double().numpy()


@pytest.fixture
def many_tokens():
    return torch.randint(tiny.VOCAB, (48, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("gap", GAPS)
def test_what_is_left_takes_over_most_of_what_is_gone(name, gap, many_tokens):
    model = tiny.make_model(name, num_hidden_layers=4)
    plan = plan_without(model, GAPS[gap])
    target = stream_after(model, name, 3, many_tokens)

    def lost(**fields):
        pruned = pruned_by(model, plan, many_tokens, **fields).model
        return np.square(stream_after(pruned, name, -1, many_tokens) - target).mean()

    assert lost() < 0.5 * lost(reconstruction="none")


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_projection_before_a_gap_aims_at_the_dense_stream_after_it(name, many_tokens):
    """ReplaceMe's closed form, where nothing was lost before."""
    model = tiny.make_model(name, num_hidden_layers=4)
    pruner = pruned_by(model, plan_without(model, [2, (3, "attention")]), many_tokens, ridge=0.01)
    before, after = (stream_after(model, name, layer, many_tokens) for layer in (1, 2))
    sites = {site.key: site for site in find_sites(model)}
    written = []
    handle = sites[3, "attention"].projection.register_forward_hook(
        lambda _module, _args, output: written.append(output)
    )
    model(many_tokens)
    handle.remove()
    residual = after + written[0].flatten(0, -2).double().numpy() - before

    site = sites[1, "mlp"]
    inputs = tiny.projection_inputs(model, site, many_tokens)
    share = 0.01 * np.square(inputs).sum(0).mean()
    change = np.linalg.solve(inputs.T @ inputs + share * np.eye(inputs.shape[1]), inputs.T @ residual).T
    expected = site.projection.weight.double().numpy() + change
    (found,) = [site for site in find_sites(pruner.model) if site.key == (1, "mlp")]

    np.testing.assert_allclose(
        found.projection.weight.double().numpy(), expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max()
    )
    # Sites before the last one in front of the gap have nothing to make up for.
    for key in ((0, "mlp"), (1, "attention")):
        (untouched,) = [site for site in find_sites(pruner.model) if site.key == key]
        assert torch.equal(untouched.projection.weight, sites[key].projection.weight)


@pytest.mark.parametrize(
    ("name", "order"),
    [("llama_gqa_biases", "sequential"), ("gemma3_text", "sequential"), ("gemma3_text", "independent")],
)
def test_a_model_on_disk_is_repaired_bit_for_bit_as_in_memory(name, order, many_tokens, tmp_path):
    model = deep_model(name)
    model.save_pretrained(tmp_path / "dense")
    plan, weights = plan_without(model, [1, 2]), {}
    for place in ("memory", "disk"):
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=place == "disk")
        pruner.prune(plan=plan, dataset=many_tokens, reconstruction="least_squares", reconstruction_order=order)
        pruner.save_pretrained(tmp_path / place)
        files = (tmp_path / place).glob("*.safetensors")
        weights[place] = {name: tensor for file in files for name, tensor in load_file(file).items()}

    assert all(torch.equal(tensor, weights["memory"][name]) for name, tensor in weights["disk"].items())


def test_every_site_after_a_gap_at_the_start_is_fitted(many_tokens):
    model = deep_model("llama_gqa_biases")
    pruner = pruned_by(model, plan_without(model, [0]), many_tokens)
    left = {f"{layer}.{kind}" for layer in (1, 2, 3) for kind in ("attention", "mlp")}

    assert pruner.plan.metadata["reconstructed"].keys() == left


def test_sources_are_refitted_across_a_gap_too(many_tokens):
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=4)
    plan = plan_without(model, [1, (2, "mlp")])
    target = stream_after(model, "llama", 3, many_tokens)

    def lost(**fields):
        pruned = pruned_by(model, plan, many_tokens, **fields).model
        return np.square(stream_after(pruned, "llama", -1, many_tokens) - target).mean()

    assert lost(refit_sources=True) < lost() < lost(reconstruction="none")


@pytest.mark.parametrize("order", ["sequential", "independent"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_outputs_that_are_normalized_take_over_what_follows(name, order, many_tokens):
    """Sublayers alone, too, whose gap ends inside a layer."""
    model = deep_model(name)
    target = stream_after(model, name, 3, many_tokens)
    for gap in ("inner layers", "mlp and attention"):
        plan = plan_without(model, GAPS[gap])

        def lost(plan=plan, **fields):
            pruned = pruned_by(model, plan, many_tokens, **fields).model
            return np.square(stream_after(pruned, name, -1, many_tokens) - target).mean()

        assert lost(reconstruction_order=order) < 0.9 * lost(reconstruction="none")


@pytest.mark.parametrize("name", NORMALIZED)
def test_both_orders_fit_the_same_where_nothing_was_lost_before(name, many_tokens):
    model = deep_model(name)
    weights = [
        pruned_by(model, plan_without(model, [1, 2]), many_tokens, ridge=0.01, reconstruction_order=order)
        .model.model.layers[0]
        .mlp.down_proj.weight
        for order in ("sequential", "independent")
    ]

    assert not torch.equal(weights[0], model.model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_output_before_a_norm_is_the_one_that_leads_nearest_to_what_is_wanted():
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.RMSNorm(12)
    norm.weight.copy_(0.2 + torch.rand(12, generator=generator))
    gain, output = norm.weight, 5 * torch.randn(40, 12, generator=generator)
    wanted = torch.randn(40, 12, generator=generator) * torch.linspace(0.1, 10, 40)[:, None]
    wanted[20:] = norm(torch.randn(20, 12, generator=generator))
    found = output_before_norm(wanted, gain, output)

    assert torch.allclose(found.norm(dim=-1), output.norm(dim=-1), rtol=1e-4)
    # What a norm can return is met, and of what is longer nothing is nearer.
    left = (norm(found) - wanted).norm(dim=-1)
    assert left[20:].max() < 2e-2
    too_long = (wanted / gain.clamp_min(1e-9)).norm(dim=-1) > 12**0.5
    assert too_long[:20].any()
    for scale in (0.01, 0.1, 1.0):
        other = found + scale * torch.randn(200, 40, 12, generator=generator)
        assert ((norm(other) - wanted).norm(dim=-1) > left - 1e-4)[:, too_long].all()
    # Weights of 0 let nothing through, and where nothing is wanted, no direction is.
    gain[3] = 0
    assert output_before_norm(wanted, gain, output).isfinite().all()
    assert torch.equal(output_before_norm(torch.zeros_like(output), gain, output), torch.zeros_like(output))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("gap", ["inner layers", "mlp and attention"])
def test_independent_least_squares_takes_over_what_follows(name, gap, many_tokens):
    model = tiny.make_model(name, num_hidden_layers=4)
    plan = plan_without(model, GAPS[gap])
    target = stream_after(model, name, 3, many_tokens)

    def lost(**fields):
        pruned = pruned_by(model, plan, many_tokens, **fields).model
        return np.square(stream_after(pruned, name, -1, many_tokens) - target).mean()

    assert lost(reconstruction_order="independent") < 0.7 * lost(reconstruction="none")


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fit_before_a_gap_is_that_of_the_dense_stream_after_it(name, many_tokens):
    """Half of the features are removed too: W' minimises ‖stream after the gap - stream before - W' x_k‖²."""
    model = tiny.make_model(name, num_hidden_layers=4)
    plan = plan_without(model, [2, (3, "attention")])
    sites = {site.key: site for site in find_sites(model)}
    plan.kept[1, "mlp"] = list(range(0, sites[1, "mlp"].num_units, 2))
    pruner = pruned_by(model, plan, many_tokens, ridge=0.01, reconstruction_order="independent")
    written = []
    handles = [
        sites[key].projection.register_forward_hook(lambda _module, _args, output: written.append(output))
        for key in ((2, "attention"), (2, "mlp"), (3, "attention"))
    ]
    model(many_tokens)
    for handle in handles:
        handle.remove()
    site, kept = sites[1, "mlp"], plan.kept[1, "mlp"]
    inputs = tiny.projection_inputs(model, site, many_tokens)
    weight = site.projection.weight.double().numpy()
    others = np.setdiff1d(np.arange(inputs.shape[1]), kept)
    residual = inputs[:, others] @ weight[:, others].T + sum(
        output.flatten(0, -2).double().numpy() for output in written
    )
    x = inputs[:, kept]
    change = np.linalg.solve(x.T @ x + 0.01 * np.square(x).sum(0).mean() * np.eye(x.shape[1]), x.T @ residual).T
    (found,) = [site for site in find_sites(pruner.model) if site.key == (1, "mlp")]
    expected = weight[:, kept] + change
    np.testing.assert_allclose(
        found.projection.weight.double().numpy(), expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max()
    )
    details = pruner.plan.metadata["reconstructed"]["1.mlp"]
    held_out = [*range(7, 48, 8)]
    tokens = np.concatenate([np.arange(32) + 32 * window for window in held_out])
    assert details["held_out_error_before"] == pytest.approx(np.square(residual[tokens]).sum(1).mean(), rel=1e-3)


def test_independent_repair_is_the_same_with_the_statistics_of_scores_and_on_disk(many_tokens, tmp_path):
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "dense")
    request = {
        "kinds": ["layer", "mlp"],
        "depth_sparsity": 0.25,
        "sparsity": 0.4,
        "reconstruction_order": "independent",
    }
    pruners = [FwdPruner.from_pretrained(tmp_path / "dense", low_memory=low_memory) for low_memory in (False, True)]
    for pruner in pruners:
        pruner.prune(dataset=many_tokens, **request)
    plan = pruners[0].plan
    replayed = pruned_by(model, plan, many_tokens, reconstruction_order="independent")
    assert pruners[1].plan.kept == plan.kept
    for pruner, name in ((pruners[1], "on_disk"), (replayed, "replayed"), (pruners[0], "in_memory")):
        pruner.save_pretrained(tmp_path / name)
    weights = [
        {
            name: tensor
            for file in (tmp_path / folder).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in ("in_memory", "on_disk", "replayed")
    ]
    for name, tensor in weights[0].items():
        for others in weights[1:]:
            torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)


def test_where_the_stream_is_normalized_nothing_is_taken_over_and_a_warning_says_so(many_tokens, caplog):
    model = tiny.make_model("opt_post_norm_projected")
    plan = plan_without(model, [(1, "mlp")])
    pruned_by(model, plan, many_tokens, reconstruction_order="independent")

    assert "no projection compensates for removed sublayers (1)" in caplog.text
