"""Gradients from forward passes: unbiased, reproducible, and loud where they are noise."""

import logging

import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, find_sites
from optimum_fwdprune.scoring.gradients import zeroth_order as module
from optimum_fwdprune.scoring.gradients.backprop import unit_gradients, weight_gradients
from optimum_fwdprune.scoring.gradients.perturbation import Noise, UnitPerturbation, WeightPerturbation
from optimum_fwdprune.scoring.gradients.sensitivity import estimated, jackknife
from optimum_fwdprune.scoring.gradients.zeroth_order import Sampling, Stopping, draw_slopes


SMALL = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def small():
    """A model of a few hundred prunable weights in float64."""
    return tiny.make_model("llama_gqa_biases", dtype=torch.float64, **SMALL)


@pytest.fixture
def windows():
    return Calibration(torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(1)))


def measure(model, perturbation, calibration, **changes):
    stopping = Stopping(changes.pop("is_converged"), changes.pop("check_every")) if "is_converged" in changes else None
    checkpoint = changes.pop("checkpoint", None)
    sampling = Sampling(**{"draws": 8, "epsilon": 1e-4, "windows_per_draw": 4, "batch_size": 64, **changes})
    return draw_slopes(model.eval(), perturbation, calibration, sampling, stopping, checkpoint)


def relative_errors(perturbation, draws, exact, counts):
    """Root mean square of |estimate - gradient| / |gradient| over disjoint runs of so many draws."""
    sizes = torch.cat([gradient.flatten() for gradient in exact]).norm()
    noise = torch.stack(
        [
            torch.cat([perturbation.noise(draw, index).double().flatten() for index in range(len(exact))])
            for draw in draws.indices
        ]
    )
    target = torch.cat([gradient.flatten() for gradient in exact])
    found = []
    for count in counts:
        runs = (draws.slopes[:, None] * noise).split(count)
        estimates = torch.stack([run.mean(0) for run in runs if len(run) == count])
        found.append(float((estimates - target).square().sum(1).mean().sqrt() / sizes))
    return found


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("perturb", ["weights", "units"])
def test_the_mean_of_many_draws_converges_to_the_gradient(small, windows, perturb, distribution):
    """With an error that falls as 1/√draws, from √(dimension / draws) on."""
    sites = find_sites(small, "kv_group")
    if perturb == "units":
        perturbation = UnitPerturbation(sites, Noise(0, distribution))
        gates = unit_gradients(small, sites, windows, 4)
        exact = [torch.cat([gates[site.key] for site in sites])]
    else:
        perturbation = WeightPerturbation(sites, Noise(0, distribution))
        parameters = [parameter for site in sites for _, parameter in site.owned_parameters()]
        exact = weight_gradients(small, parameters, windows, 4)
    draws = measure(small, perturbation, windows, draws=2048)
    errors = relative_errors(perturbation, draws, exact, (32, 128, 512))
    dimension = sum(gradient.numel() for gradient in exact)

    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.25)
    assert errors[0] == pytest.approx((dimension / 32) ** 0.5, rel=0.3)
    # No bias is left under the scatter: all draws together point where the gradient points.
    assert relative_errors(perturbation, draws, exact, (2048,))[0] < 1.5 * (dimension / 2048) ** 0.5


def test_sums_by_group_add_up_to_the_estimate(small, windows):
    perturbation = WeightPerturbation(find_sites(small), Noise(0))
    draws = measure(small, perturbation, windows, draws=5)
    expected = sum(slope * perturbation.noise(draw, 2) for draw, slope in zip(draws.indices, draws.slopes.tolist()))

    torch.testing.assert_close(draws.gradient_sums(perturbation, 2, groups=1)[0], expected)
    torch.testing.assert_close(draws.gradient_sums(perturbation, 2, groups=3).sum(0), expected)
    estimate, *left_out = estimated(perturbation, draws, groups=3)(2)
    torch.testing.assert_close(estimate, expected / 5)
    without = draws.slopes[1] * perturbation.noise(1, 2) + draws.slopes[4] * perturbation.noise(4, 2)
    torch.testing.assert_close(left_out[1], (expected - without) / 3)


@pytest.mark.parametrize("kind", [WeightPerturbation, UnitPerturbation])
def test_batches_of_any_size_measure_the_same_draws(dense, tokens, kind):
    perturbation = kind(find_sites(dense), Noise(2))
    slopes = [
        measure(
            dense, perturbation, Calibration(tokens), draws=6, epsilon=1e-2, windows_per_draw=3, batch_size=size
        ).slopes
        for size in (1, 4, 7, 36)
    ]

    for other in slopes[1:]:
        torch.testing.assert_close(other, slopes[0], rtol=1e-3, atol=1e-3 * float(slopes[0].abs().max()))


def test_draws_walk_through_all_windows(small, monkeypatch):
    """Draw k takes the k-th run of windows, from the start again after the last."""
    calibration = Calibration(torch.arange(5)[:, None].repeat(1, 6))
    seen = []
    forward = small.forward
    monkeypatch.setattr(small, "forward", lambda **kwargs: seen.append(kwargs["input_ids"][:, 0]) or forward(**kwargs))
    measure(
        small, UnitPerturbation(find_sites(small), Noise(0)), calibration, draws=3, windows_per_draw=2, batch_size=4
    )
    seen.pop(1)  # The first draw is repeated to measure rounding.

    assert [rows.tolist() for rows in seen] == [[0, 1, 0, 1], [2, 3, 2, 3], [4, 0, 4, 0]]


def test_padding_changes_nothing(tokens):
    model = tiny.make_model("llama_gqa_biases", dtype=torch.float64)
    mask = torch.ones(16, 30, dtype=torch.int64)
    mask[:, :6] = 0
    padded = Calibration(torch.cat([torch.zeros(16, 6, dtype=torch.int64), tokens], dim=1), mask)
    perturbation = WeightPerturbation(find_sites(model), Noise(0))

    expected = measure(model, perturbation, Calibration(tokens), epsilon=1e-2).slopes
    found = measure(model, perturbation, padded, epsilon=1e-2).slopes
    # Norms and softmax of the model run in float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_losses_are_those_of_the_models_with_written_weights(small, windows):
    """Σ negative log-likelihood / Σ tokens, at +ε and at -ε."""
    perturbation = WeightPerturbation(find_sites(small), Noise(0))
    draws = measure(small, perturbation, windows, draws=2, epsilon=1e-2)
    for side, step in enumerate((1e-2, -1e-2)):
        with perturbation.applied([1] * 4, [step] * 4), torch.no_grad():
            loss = small(input_ids=windows.input_ids, labels=windows.input_ids).loss
        assert float(draws.losses[1, side]) == pytest.approx(float(loss), rel=1e-6)
    assert float(draws.slopes[1]) == pytest.approx(float(draws.losses[1, 0] - draws.losses[1, 1]) / 2e-2)


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float32, 1e-12), (torch.bfloat16, 1e-7)])
@pytest.mark.parametrize("kind", [WeightPerturbation, UnitPerturbation])
def test_an_epsilon_lost_in_rounding_is_refused_with_one_that_works(tokens, kind, dtype, epsilon):
    model = tiny.make_model("llama_gqa_biases", dtype=dtype)
    perturbation, calibration = kind(find_sites(model), Noise(0)), Calibration(tokens)
    with pytest.raises(ValueError, match=r"is lost in rounding: the loss is .* on both sides") as caught:
        measure(model, perturbation, calibration, epsilon=epsilon)
    works = float(str(caught.value).rsplit("epsilon=", 1)[1].split(",")[0])

    draws = measure(model, perturbation, calibration, epsilon=works)
    assert epsilon < works <= 1
    assert draws.rounding_floor < 0.6 * float(draws.slopes.square().mean().sqrt())


def test_a_model_that_does_not_respond_is_named(tokens):
    model = tiny.make_model("llama_gqa_biases")
    model.lm_head.weight.data.zero_()
    with pytest.raises(ValueError, match="does not depend on the perturbed weights"):
        measure(model, UnitPerturbation(find_sites(model), Noise(0)), Calibration(tokens))


def losses_with_nan(monkeypatch, bad):
    """Let the losses of the draws `bad` be NaN on one side."""
    losses = module._Sampler.losses

    def damaged(self, draws, epsilon):
        measured, differences = losses(self, draws, epsilon)
        for place, draw in enumerate(draws):
            if draw in bad:
                measured[place, 1] = torch.nan
        return measured, differences

    monkeypatch.setattr(module._Sampler, "losses", damaged)


def test_draws_without_a_finite_loss_are_rejected_and_counted(small, windows, monkeypatch, caplog):
    perturbation = WeightPerturbation(find_sites(small), Noise(0))
    expected = measure(small, perturbation, windows, draws=9, batch_size=8)
    losses_with_nan(monkeypatch, bad={0, 3})
    monkeypatch.setattr(logging.getLogger("optimum_fwdprune.scoring.gradients.zeroth_order"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        draws = measure(small, perturbation, windows, draws=9, batch_size=8)

    assert draws.rejected == 2
    assert draws.indices == [1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(draws.slopes, expected.slopes[draws.indices])
    assert "2 draws were rejected" in caplog.text


def test_too_many_rejected_draws_are_an_error(small, windows, monkeypatch):
    losses_with_nan(monkeypatch, bad={1, 2, 3})
    with pytest.raises(ValueError, match=r"3 of 9 draws had a loss that is not finite at epsilon=0\.0001"):
        measure(small, WeightPerturbation(find_sites(small), Noise(0)), windows, draws=9, batch_size=8)


def test_a_model_that_overflows_everywhere_is_an_error(small, windows):
    small.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="1 of 1 draws"):
        measure(small, WeightPerturbation(find_sites(small), Noise(0)), windows, draws=1)


def test_the_rounding_floor_is_the_scatter_of_slopes_between_dtypes(tokens, monkeypatch, caplog):
    """In bfloat16 slopes differ from those in float64 by about as much as the floor says; and a loud floor is said."""
    calibration = Calibration(tokens)
    exact_model, coarse_model = (
        tiny.make_model("llama_gqa_biases", dtype=dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    with torch.no_grad():
        for parameter, rounded in zip(exact_model.parameters(), coarse_model.parameters()):
            parameter.copy_(rounded)
    exact = measure(exact_model, WeightPerturbation(find_sites(exact_model), Noise(0)), calibration, epsilon=1e-3)
    perturbation = WeightPerturbation(find_sites(coarse_model), Noise(0))
    coarse = measure(coarse_model, perturbation, calibration, epsilon=1e-3)
    scatter = float((coarse.slopes - exact.slopes).square().mean().sqrt())

    assert exact.rounding_floor < 1e-2 * coarse.rounding_floor
    assert scatter / 3 < coarse.rounding_floor < 3 * scatter
    # A tenth of the step measures noise, and says so.
    monkeypatch.setattr(logging.getLogger("optimum_fwdprune.scoring.gradients.zeroth_order"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        measure(coarse_model, perturbation, calibration, epsilon=1e-2)
        assert "Rounding" not in caplog.text
        measure(coarse_model, perturbation, calibration, epsilon=1e-4)
    assert "Rounding in torch.bfloat16 makes up about" in caplog.text


def test_standard_errors_are_the_scatter_over_seeds(small, windows):
    """The jackknife of one run against what 40 independent runs do."""
    sites = find_sites(small, "kv_group")
    estimates, errors = [], []
    for seed in range(40):
        perturbation = UnitPerturbation(sites, Noise(seed))
        draws = measure(small, perturbation, windows, draws=64)
        scores = torch.stack(list(estimated(perturbation, draws, groups=32)(0)))
        estimates.append(scores[0])
        errors.append(jackknife(scores))
    scatter = torch.stack(estimates).std(0)

    torch.testing.assert_close(torch.stack(errors).mean(0), scatter, rtol=0.35, atol=0)


def test_the_stopping_rule_sees_all_draws_so_far(small, windows):
    counts = []

    def is_converged(draws):
        counts.append(len(draws.indices))
        return len(draws.indices) >= 9

    perturbation = UnitPerturbation(find_sites(small), Noise(0))
    alone = measure(small, perturbation, windows, draws=9)
    for batch_size in (1, 16, 64):
        counts.clear()
        draws = measure(
            small, perturbation, windows, draws=100, batch_size=batch_size, is_converged=is_converged, check_every=3
        )

        assert counts == [3, 6, 9]
        assert draws.converged and len(draws.indices) == 9
        torch.testing.assert_close(draws.slopes, alone.slopes, rtol=1e-4, atol=1e-6)


def test_draws_that_stopped_early_still_say_what_was_rejected(small, windows, monkeypatch, caplog):
    losses_with_nan(monkeypatch, bad={1})
    monkeypatch.setattr(logging.getLogger("optimum_fwdprune.scoring.gradients.zeroth_order"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        perturbation = UnitPerturbation(find_sites(small), Noise(0))
        draws = measure(small, perturbation, windows, draws=20, is_converged=lambda _: True, check_every=4)

    assert len(draws.indices) == 3 and "1 draws were rejected" in caplog.text
