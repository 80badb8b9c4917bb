"""The methods that score experts, against their definitions computed expert by expert."""

import pytest
import tiny_mixtures
import torch
from torch.nn import functional as F

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.forward.gates import gated
from optimum_fwdprune.scoring.scores import Scores


def scores_of(model, tokens, **fields):
    return FwdPruner(model).score(dataset=tokens, kinds=["expert"], **fields).values


@torch.no_grad()
def routed_by_hand(model, tokens, layer):
    """What a mixture is called with, and the experts and weights of every token by its router."""
    site = next(site for site in find_sites(model) if site.key == (layer, "expert"))
    seen = []
    handle = site.output.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    model(tokens)
    handle.remove()
    _, weights, experts = site.routing.router(seen[0])
    return site.routing.experts, seen[0].double(), weights.double(), experts


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_reap_is_the_mean_of_weight_times_norm_over_routed_tokens(name, tokens):
    model = tiny_mixtures.make_mixture(name)
    experts, hidden, weights, chosen = routed_by_hand(model, tokens, 2)
    expected = torch.zeros(8, dtype=torch.float64)
    for number in range(8):
        token, slot = torch.where(chosen == number)
        gate, up = F.linear(hidden[token], experts.gate_up_proj[number].double()).chunk(2, -1)
        output = F.linear(F.silu(gate) * up, experts.down_proj[number].double())
        expected[number] = (weights[token, slot] * output.norm(dim=-1)).sum() / max(1, len(token))

    torch.testing.assert_close(scores_of(model, tokens)[(2, "expert")], expected.float(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_frequency_is_the_share_of_the_tokens_and_an_unused_expert_scores_zero(tokens):
    model, few = tiny_mixtures.make_mixture("mixtral"), tokens[:2, :3]
    _, _, _, chosen = routed_by_hand(model, few, 1)
    times = chosen.flatten().bincount(minlength=8)
    assert 0 < (times == 0).sum() < 7

    shares = scores_of(model, few, method="expert_frequency")[(1, "expert")]
    torch.testing.assert_close(shares, times / len(chosen))
    assert torch.equal(scores_of(model, few)[(1, "expert")] == 0, times == 0)


def test_padding_is_no_token(tokens):
    model = tiny_mixtures.make_mixture("olmoe")
    mask = torch.ones_like(tokens)
    mask[:, 16:] = 0
    padded = {"input_ids": tokens, "attention_mask": mask}
    for method in ("reap", "expert_frequency"):
        whole, part = scores_of(model, padded, method=method), scores_of(model, tokens[:, :16], method=method)
        assert all(torch.allclose(whole[key], part[key], rtol=1e-4) for key in part)


@torch.no_grad()
def test_magnitude_is_the_norm_of_an_expert_with_its_row_of_the_router(tokens):
    model = tiny_mixtures.make_mixture("gpt_oss")
    mixture = model.model.layers[0].mlp
    owned = [*mixture.experts.parameters(), *mixture.router.parameters()]
    expected = sum(parameter.double().square().flatten(1).sum(1) for parameter in owned if parameter.dim() > 1)
    expected = (expected + mixture.router.bias.double().square()).sqrt()

    scores = scores_of(model, tokens, method="magnitude")[(0, "expert")]
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-6)


def test_scores_are_the_same_in_batches_of_any_size_and_after_saving(tokens, tmp_path):
    pruner = FwdPruner(tiny_mixtures.make_mixture("qwen2_moe"))
    scores = pruner.score(dataset=tokens, kinds=["expert"], batch_size=16)
    again = pruner.score(dataset=tokens, kinds=["expert"], batch_size=3)
    scores.save(tmp_path / "scores.safetensors")
    read = Scores.load(tmp_path / "scores.safetensors")

    for key, values in scores.values.items():
        assert key.kind == "expert"
        torch.testing.assert_close(again.values[key], values, rtol=1e-5, atol=1e-7)
        assert torch.equal(read.values[key], values)
        assert torch.equal(read.statistics[key].routed, scores.statistics[key].routed)
    pruner.prune(scores=read, kinds=["expert"], sparsity=0.5)
    assert pruner.model.config.num_experts == 4


@pytest.mark.parametrize("method", ["reap", "expert_frequency", "magnitude", "random"])
def test_the_lowest_scores_are_removed_equally_many_in_every_layer_and_group(method, tokens):
    pruner = FwdPruner(tiny_mixtures.make_mixture("deepseek_v3"))
    pruner.prune(dataset=tokens, method=method, kinds=["expert"], sparsity=0.5)

    for layer in (1, 2):
        scores, kept = pruner.scores.values[(layer, "expert")], pruner.plan.kept[(layer, "expert")]
        for group in (range(4), range(4, 8)):
            lowest = sorted(group, key=lambda expert: float(scores[expert]))[:2]
            assert set(group) - set(kept) == set(lowest)
    assert pruner.plan.kept[(0, "mlp")] == list(range(24))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_removal_loss_removes_the_expert_whose_removal_changes_the_predictions_least(name, tokens):
    """Found again with masks and whole forward passes: in a round, every layer and group loses one, the last first."""
    model = tiny_mixtures.make_mixture(name)
    sites = [site for site in find_sites(model) if site.routing]
    dense, gone = model(tokens).logits[:, 3::4].log_softmax(-1), {site.key: [] for site in sites}

    def divergence(extra):
        kept = {
            site.key: [one for one in range(8) if one not in gone[site.key] + extra.get(site.key, [])]
            for site in sites
        }
        with gated(sites, {site.key: site.unit_mask(kept[site.key]) for site in sites}):
            logits = model(tokens).logits[:, 3::4].log_softmax(-1)
        return float((dense.exp() * (dense - logits)).sum(-1).mean())

    for _ in range(2):
        for site in reversed(sites):
            for group in range(site.num_groups):
                size = 8 // site.num_groups
                others = [one for one in range(group * size, (group + 1) * size) if one not in gone[site.key]]
                gone[site.key].append(min(others, key=lambda one: divergence({site.key: [one]})))

    share = 2 * sites[0].num_groups / 8
    scores = FwdPruner(model).score(dataset=tokens, kinds=["expert"], method="removal_loss", sparsity=share)
    for site in sites:
        assert scores.values[site.key][gone[site.key]].tolist() == list(range(len(gone[site.key])))
    assert scores.details["removed"] == {str(key): experts for key, experts in gone.items()}
    assert scores.details["divergence"][-1] == pytest.approx(divergence({}), rel=0.01)
