"""Layers and sublayers as units: their scores against plain loops, which of them go, and what requests are refused."""

import pytest
import tiny
import torch
import transformers
from torch.nn import functional as F

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig, Scores, find_sites
from optimum_fwdprune.forward.gates import gated
from optimum_fwdprune.scoring import removal


DEEP = {"num_hidden_layers": 5}


def deep_model(name="llama_gqa_biases"):
    return tiny.make_model(name, **DEEP)


def gone_of(pruner):
    return [tuple(key) for key, kept in sorted(pruner.plan.kept.items()) if not kept]


def closed(sites):
    return {site.key: torch.zeros(site.num_units) for site in sites}


@pytest.fixture
def padded(tokens):
    mask = torch.ones_like(tokens)
    mask[::2, :5] = 0
    return Calibration(tokens, mask)


class TestBlockInfluence:
    @torch.no_grad()
    @pytest.mark.parametrize("name", tiny.REPRESENTATIVE)
    def test_it_is_one_minus_the_mean_cosine_across_a_layer(self, name, padded):
        model = tiny.make_model(name)
        seen = []
        layers = model.base_model.get_submodule({"opt_pre_norm": "decoder.layers", "bloom": "h"}.get(name, "layers"))

        def record(_module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            seen.append((before, output[0] if isinstance(output, tuple) else output))

        handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
        model(padded.input_ids, attention_mask=padded.attention_mask)
        for handle in handles:
            handle.remove()
        rows = padded.attention_mask.bool()
        expected = [1 - F.cosine_similarity(before[rows], after[rows], dim=-1).mean() for before, after in seen]
        scores = FwdPruner(model).score(method="block_influence", kinds=["layer"], dataset=padded).values

        assert scores.keys() == {(layer, "layer") for layer in range(len(layers))}
        torch.testing.assert_close(
            torch.cat([scores[layer, "layer"] for layer in range(len(layers))]),
            torch.stack(expected),
            rtol=1e-3,
            atol=1e-5,
        )

    @torch.no_grad()
    def test_of_sublayers_it_looks_at_the_stream_between_them(self, tokens):
        model = tiny.make_model("llama_gqa_biases")
        streams = {}
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_pre_hook(
                lambda _module, args, number=number: streams.__setitem__((number, 0), args[0])
            )
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _module, args, number=number: streams.__setitem__((number, 1), args[0])
            )
        model(tokens)
        between = dict(streams)
        scores = FwdPruner(tiny.make_model("llama_gqa_biases"))
        scores = scores.score(method="block_influence", kinds=["sublayer"], dataset=tokens).values
        for (number, kind), after in (
            ((0, "attention"), between[0, 1]),
            ((0, "mlp"), between[1, 0]),
            ((1, "attention"), between[1, 1]),
        ):
            before = between[number, 0 if kind == "attention" else 1]
            expected = 1 - F.cosine_similarity(before, after, dim=-1).mean()

            torch.testing.assert_close(scores[number, f"{kind}_sublayer"][0], expected, rtol=1e-3, atol=1e-5)

    def test_layers_that_are_read_from_disk_score_the_same(self, tokens, tmp_path):
        deep_model().save_pretrained(tmp_path)
        request = {"method": "block_influence", "kinds": ["sublayer"], "dataset": tokens}
        memory, disk = (FwdPruner.from_pretrained(tmp_path, low_memory=low).score(**request) for low in (False, True))

        for key, value in memory.values.items():
            torch.testing.assert_close(disk.values[key], value)


class TestRemovalLoss:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["layer", "sublayer"])
    def test_it_is_the_greedy_choice_by_the_divergence_of_whole_models(self, kind, tokens):
        model = deep_model()
        sites = find_sites(model)
        units = {}
        for site in sites:
            key = (site.layer, "layer") if kind == "layer" else (site.layer, f"{site.kind}_sublayer")
            units.setdefault(key, []).append(site)
        every = slice(3, None, 4)
        dense = model(tokens).logits[:, every].double().log_softmax(-1)

        def divergence(gone):
            with gated(sites, closed([site for key in gone for site in units[key]])):
                log = model(tokens).logits[:, every].double().log_softmax(-1)
            return float((dense.exp() * (dense - log)).sum(-1).mean())

        gone = []
        for _ in range(3):
            gone.append(min((key for key in units if key not in gone), key=lambda key: divergence([*gone, key])))
        pruner = FwdPruner(model)
        sparsity = 3 / len(units)
        scores = pruner.score(method="removal_loss", kinds=[kind], sparsity=sparsity, dataset=tokens)

        assert [tuple(key) for key, rank in sorted(scores.values.items(), key=lambda item: item[1])][:3] == gone
        assert scores.details["divergence"][-1] == pytest.approx(divergence(gone), rel=2e-2)
        # One pass less than a whole one for every candidate, since what is before it and what is gone are not run.
        assert scores.details["windows"] < len(tokens) * 3 * len(units)

    def test_an_interrupted_order_is_taken_up_where_it_ended(self, tokens, tmp_path, monkeypatch):
        request = {"method": "removal_loss", "kinds": ["layer"], "sparsity": 0.6, "dataset": tokens}
        expected = FwdPruner(deep_model()).score(**request)
        measured, calls = removal._measured, []

        def stopping(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return measured(*args)

        monkeypatch.setattr(removal, "_measured", stopping)
        request |= {"resume": str(tmp_path), "resume_seconds": 0.0}
        with pytest.raises(KeyboardInterrupt):
            FwdPruner(deep_model()).score(**request)
        resumed = FwdPruner(deep_model()).score(**request)

        assert len(calls) == 4
        assert resumed.details["removed"] == expected.details["removed"]

    def test_models_that_predict_no_tokens_are_refused(self, tokens):
        model = tiny.make_model("llama_gqa_biases", transformers.AutoModel)
        with pytest.raises(ValueError, match=r"LlamaModel does not predict the next token.*block_influence"):
            FwdPruner(model).prune(method="removal_loss", dataset=tokens)


class TestBudgets:
    @pytest.mark.parametrize("method", ["block_influence", "removal_loss", "magnitude", "random"])
    @pytest.mark.parametrize("kind", ["layer", "sublayer"])
    def test_a_sparsity_is_the_share_of_the_units_and_the_lowest_scores_go(self, method, kind, tokens):
        pruner = FwdPruner(deep_model())
        pruner.prune(method=method, kinds=[kind], sparsity=0.4, dataset=tokens, reconstruction="none")
        units = 5 if kind == "layer" else 10
        order = sorted(pruner.scores.values, key=lambda key: float(pruner.scores.values[key]))[: round(0.4 * units)]
        kinds = {"layer": ["attention", "mlp"]}

        assert len(pruner.scores.values) == units
        assert gone_of(pruner) == sorted(
            (layer, kind) for layer, name in order for kind in kinds.get(name, [name.partition("_")[0]])
        )
        assert pruner.report.masked_difference < 1e-4

    def test_depth_goes_first_and_widths_give_the_rest(self, tokens):
        pruner = FwdPruner(deep_model())
        pruner.prune(kinds=["layer", "mlp"], depth_sparsity=0.2, sparsity=0.4, skip_layers=[], dataset=tokens)
        (lost,) = {layer for layer, _ in gone_of(pruner)}
        left = [layer for layer in range(5) if layer != lost]

        assert gone_of(pruner) == [(lost, "attention"), (lost, "mlp")]
        assert float(pruner.scores.values[lost, "layer"]) == min(
            float(pruner.scores.values[n, "layer"]) for n in range(5)
        )
        assert pruner.report.sparsity == pytest.approx(0.4, abs=0.01)
        assert len({len(pruner.plan.kept[layer, "mlp"]) for layer in left}) == 1
        assert all(len(pruner.plan.kept[layer, "attention"]) == 6 for layer in left)

    def test_a_target_for_the_parameters_is_met(self, tokens):
        model = deep_model()
        target = int(0.7 * sum(parameter.numel() for parameter in model.parameters()))
        pruner = FwdPruner(model)
        pruner.prune(method="removal_loss", target_parameters=target, dataset=tokens, reconstruction="none")
        before, after = pruner.report.parameters_before, pruner.report.parameters_after

        # With one layer more it would not be.
        assert after <= target < after + (before - after) / (len(gone_of(pruner)) // 2)

    def test_skipped_layers_stay(self, tokens):
        pruner = FwdPruner(deep_model())
        pruner.prune(method="random", kinds=["layer"], sparsity=0.4, skip_layers=[0, 1, -1], dataset=tokens)

        assert {layer for layer, _ in gone_of(pruner)} == {2, 3}

    def test_the_last_attention_stays(self, tokens):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(method="random", kinds=["sublayer"], sparsity=0.83, dataset=tokens, reconstruction="none")

        assert len(gone_of(pruner)) == 5 and sum(kind == "attention" for _, kind in gone_of(pruner)) == 2

    def test_scores_serve_another_budget_and_survive_the_disk(self, tokens, tmp_path):
        pruner = FwdPruner(deep_model())
        pruner.score(method="removal_loss", kinds=["layer"], sparsity=0.4, dataset=tokens).save(tmp_path / "scores")
        scores = Scores.load(tmp_path / "scores")
        pruner.prune(method="removal_loss", kinds=["layer"], sparsity=0.2, scores=scores, reconstruction="none")

        assert gone_of(pruner) == [
            (layer, kind)
            for layer in range(5)
            for kind in ("attention", "mlp")
            if float(scores.values[layer, "layer"]) == 0
        ]
        with pytest.raises(ValueError, match=r"made with kinds=\['layer'\], and the request has kinds=\['sublayer'\]"):
            FwdPruner(deep_model()).prune(method="removal_loss", kinds=["sublayer"], scores=scores)

    def test_methods_of_layers_alone_prune_layers_by_default(self):
        assert PruningConfig("block_influence").resolved_kinds == ["layer"]
        assert PruningConfig("magnitude").resolved_kinds == ["mlp"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"kinds": ["layer"], "method": "wanda_sp"},
                r"method='wanda_sp' scores attention, mlp and not layer.*These do: block_influence, magnitude, ",
            ),
            (
                {"kinds": ["mlp"], "method": "removal_loss"},
                r"scores layer, sublayer, expert and not mlp.*These do: flap, ",
            ),
            ({"kinds": ["layer", "sublayer"], "method": "random"}, "a layer is two sublayers. Use sublayer alone"),
            ({"kinds": ["layer", "mlp"]}, "Set depth_sparsity to the fraction"),
            ({"kinds": ["mlp"], "depth_sparsity": 0.2}, "Use sparsity, or add the others to kinds"),
            ({"kinds": ["layer"], "method": "random", "depth_sparsity": 0.2}, "Use sparsity, or add the others"),
            ({"kinds": ["layer"], "method": "random", "depth_method": "random"}, "Use method, or add the others"),
            ({"kinds": ["layer", "mlp"], "depth_sparsity": 1.0}, r"depth_sparsity must be in \[0, 1\)"),
            ({"kinds": ["layer", "mlp"], "depth_sparsity": 0.2, "depth_method": "flap"}, "depth_method='flap' scores"),
            ({"kinds": ["layer", "mlp"], "depth_sparsity": 0.2, "depth_method": "flab"}, "Did you mean flap"),
            (
                {"kinds": ["layer"], "method": "random", "scope": "search"},
                "scope='search' cannot be combined with 'layer'",
            ),
            (
                {"kinds": ["layer"], "method": "random", "scope": "layer"},
                "scope='layer' cannot be combined with 'layer'",
            ),
            ({"kinds": ["sublayer"], "method": "random", "layout": "stock"}, "use 'layer' instead of 'sublayer'"),
            ({"kinds": ["heads"]}, "kinds must be one of attention, mlp, expert, layer, sublayer"),
            (
                {"kinds": ["layer", "mlp"], "depth_sparsity": 0.2, "method": "policy_gradient"},
                "method='policy_gradient' cannot be combined with 'layer'",
            ),
        ],
    )
    def test_requests_that_contradict_themselves(self, fields, message):
        with pytest.raises(ValueError, match=message):
            PruningConfig(**fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"sparsity": 0.9},
                "Removing 3 of 3 layers is more .* only 2 can be removed. The largest possible sparsity is 0.6666",
            ),
            ({"sparsity": 0.6, "skip_layers": [0, 1]}, r"skip_layers=\[0, 1\], so that only 1 can be"),
            ({"skip_layers": [3]}, "skip_layers names layer 3; the model has layers 0 to 2"),
        ],
    )
    def test_layers_that_are_not_there_or_must_stay(self, fields, message, tokens, monkeypatch):
        monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", lambda *_: pytest.fail("it was scored"))
        with pytest.raises(ValueError, match=message):
            FwdPruner(tiny.make_model("llama_gqa_biases")).prune(
                method="random", kinds=["layer"], dataset=tokens, **fields
            )

    def test_a_family_that_cannot_do_without_layers(self, tokens, monkeypatch):
        monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", lambda *_: pytest.fail("it was scored"))
        with pytest.raises(ValueError, match="No whole layer of this opt can be removed"):
            FwdPruner(tiny.make_model("opt_post_norm_projected")).prune(
                method="random", kinds=["layer"], dataset=tokens
            )

    def test_removing_nothing_is_said(self, tokens, caplog):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(
            method="random", kinds=["layer"], sparsity=0.1, dataset=tokens
        )

        assert "This request removes nothing" in caplog.text
