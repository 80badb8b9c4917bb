"""Least squares for the output projections of kept experts."""

import pytest
import tiny_mixtures
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.reconstruction.experts import RoutedTokens, refit_experts


@pytest.fixture
def many_tokens():
    return torch.randint(0, 300, (64, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def divergence(dense_logits, model, tokens):
    dense, pruned = dense_logits.log_softmax(-1), model(tokens).logits.log_softmax(-1)
    return float((dense.exp() * (dense - pruned)).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("fields", [{}, {"reconstruction_target": "layer"}, {"reconstruction_order": "independent"}])
def test_refitted_experts_are_closer_to_the_dense_model_on_other_tokens(name, fields, many_tokens, tokens):
    dense = tiny_mixtures.make_mixture(name)
    logits = dense(tokens).logits
    left = {}
    for reconstruction in ("none", "least_squares"):
        pruner = FwdPruner(dense)
        own = fields if reconstruction == "least_squares" else {}
        request = {"kinds": ["expert"], "sparsity": 0.5, "reconstruction": reconstruction, **own}
        left[reconstruction] = divergence(logits, pruner.prune(None, many_tokens, inplace=False, **request), tokens)

    assert left["least_squares"] < 0.9 * left["none"]
    details = pruner.plan.metadata["reconstructed"]
    assert set(details) == {str(site.key) for site in find_sites(dense) if site.routing}
    for detail in details.values():
        assert detail["refitted"] and detail["held_out_error_after"] < detail["held_out_error_before"]


@torch.no_grad()
def test_only_output_projections_of_experts_change(many_tokens):
    dense = tiny_mixtures.make_mixture("qwen2_moe")
    pruner = FwdPruner(dense)
    refitted = pruner.prune(None, many_tokens, kinds=["expert"], sparsity=0.25, inplace=False).state_dict()
    cut = FwdPruner(dense).prune(plan=pruner.plan, inplace=False).state_dict()

    changed = {name for name, tensor in cut.items() if not torch.equal(tensor, refitted[name])}
    assert changed == {f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 2)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_fitted_one_after_the_other_to_what_is_left(name):
    site = find_sites(tiny_mixtures.make_mixture(name))[1]
    kept, generator = [1, 4, 6], torch.Generator().manual_seed(0)
    hidden, residual = torch.randn(200, 32, generator=generator), torch.randn(200, 32, generator=generator)
    # Expert 4 has the most tokens, expert 1 the fewest.
    indices = torch.tensor([[4, 6]] * 120 + [[4, 1]] * 60 + [[6, 4]] * 20)
    weights = torch.rand(200, 2, generator=generator)
    left = residual.double()
    projection, result = refit_experts(site, kept, [[RoutedTokens(hidden, indices, weights, residual)]], ridge=0.1)

    for expert in (4, 6, 1):
        token, slot = torch.where(indices == expert)
        features = site.routing.features(expert, hidden[token]).double() * weights[token, slot, None].double()
        gram = features.T @ features
        gram = gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        change = torch.linalg.solve(gram, features.T @ left[token]).T
        left[token] -= features @ change.T
        new = site.routing.as_stored(projection.weight[kept.index(expert)])
        torch.testing.assert_close(new, (site.routing.output_weight(expert).double() + change).float())
    assert result.refitted == 3
    torch.testing.assert_close(residual, left.float())


@torch.no_grad()
def test_what_helps_on_no_held_out_token_changes_nothing():
    site = find_sites(tiny_mixtures.make_mixture("mixtral"))[1]
    generator = torch.Generator().manual_seed(0)

    def noise(tokens):
        hidden, residual = (torch.randn(tokens, 32, generator=generator) for _ in range(2))
        indices = torch.tensor([[0, 1]] * tokens)
        return [RoutedTokens(hidden, indices, torch.ones(tokens, 2), residual)]

    projection, result = refit_experts(site, [0, 1, 2], [noise(30), noise(3000)], None)

    assert (result.refitted, projection.weight.numel()) == (0, 0)
    assert result.error_before == result.error_after


def test_experts_that_are_built_in_another_way_are_refused(monkeypatch, tokens):
    dense = tiny_mixtures.make_mixture("mixtral")
    monkeypatch.setattr(type(dense.model.layers[0].mlp.experts), "has_post_expert_norm", True, raising=False)
    for site in find_sites(dense):
        if site.routing:
            site.routing.experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"cannot be refitted.*reconstruction='none'"):
        FwdPruner(dense).prune(PruningConfig(kinds=["expert"]), tokens)
