"""Sites without a unit: layers and sublayers that are gone, with masked = sliced = reloaded, caches and plans."""

import copy

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, Qwen3Config, StaticCache

from optimum_fwdprune import FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.architectures.depth import skipped_sublayers, values_of_layers
from optimum_fwdprune.forward.gates import gated
from optimum_fwdprune.forward.layerwise import decoder_layers
from optimum_fwdprune.loading.offloading import read_parameter


# Layers and sublayers that go: the first, the last, several in a row.
GONE = {
    "first layer": [0],
    "last layer": [2],
    "two layers": [0, 1],
    "attentions": [(0, "attention"), (1, "attention")],
    "last attention": [(2, "attention")],
    "mlps": [(1, "mlp"), (2, "mlp")],
    "some of each": [0, (1, "mlp"), (2, "attention")],
}
# The representative architectures have all cases, and the others three.
CASES = [
    (name, gone)
    for name in tiny.CONFIGS
    for gone in (GONE if name in tiny.REPRESENTATIVE else ("first layer", "attentions", "some of each"))
    if name != "opt_post_norm_projected"
]
# A layer that normalizes the stream itself cannot be removed as a whole.
CASES += [("opt_post_norm_projected", gone) for gone in ("attentions", "last attention", "mlps")]


def plan_without(model, gone, narrow=()):
    """A plan without the layers and sites `gone`, and with half of the units of the sites `narrow`."""
    sites = find_sites(model)

    def kept(site):
        if site.layer in gone or site.key in gone:
            return []
        return list(range(0, site.num_units, 2 if site.key in narrow else 1))

    counts = {site.key: site.num_units for site in sites}
    return PruningPlan({site.key: kept(site) for site in sites}, counts, model.config.model_type, "query_head")


def pruned_by(model, plan, **fields):
    pruner = FwdPruner(model)
    pruner.prune(plan=plan, reconstruction="none", **fields)
    return pruner


@torch.no_grad()
def without_sites(model, plan):
    """A copy of the dense model whose projections write zeros, bias included, where the plan keeps no unit."""
    masked = copy.deepcopy(model)
    for site in find_sites(masked):
        columns = site.projection.weight.view(site.projection.out_features, site.num_units, site.unit_width)
        columns[:, plan.removed(site.key)] = 0
        if not plan.kept[site.key] and site.projection.bias is not None:
            site.projection.bias.zero_()
    return masked


@pytest.fixture
def llama():
    return tiny.make_model("llama_gqa_biases")


@torch.no_grad()
@pytest.mark.parametrize(("name", "gone"), CASES)
def test_a_model_without_sites_computes_and_generates_what_the_masked_one_does(name, gone, tokens, tmp_path):
    dense = tiny.make_model(name)
    # A model that lost whole layers alone has its stock class.
    stays_stock = all(isinstance(layer, int) for layer in GONE[gone])
    plan = plan_without(dense, GONE[gone], narrow=[] if stays_stock else [(2, "mlp")])
    masked = without_sites(dense, plan)
    pruned = pruned_by(dense, plan).model
    expected = masked(tokens).logits

    layers_left = {key.layer for key, units in plan.kept.items() if units}
    assert len(decoder_layers(pruned)) == pruned.config.num_hidden_layers == len(layers_left)
    assert (type(pruned) is type(masked)) == (pruned.config.model_type == masked.config.model_type) == stays_stock
    assert (pruned(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(name.endswith("bias") and not parameter.numel() for name, parameter in pruned.named_parameters())

    prompt = {"input_ids": tokens[:2, :10], "attention_mask": torch.ones_like(tokens[:2, :10]), "pad_token_id": 0}
    prompt["attention_mask"][0, :3] = 0
    greedy = {"max_new_tokens": 6, "do_sample": False}
    wanted = masked.generate(**prompt, **greedy, use_cache=False)
    for options in (
        {"use_cache": False},
        {"use_cache": True},
        {"past_key_values": DynamicCache()},
        *({"cache_implementation": "static"} for cache in tiny.caches_of(pruned) if cache == "static"),
    ):
        assert torch.equal(pruned.generate(**prompt, **greedy, **options), wanted), options
    beams = {**greedy, "num_beams": 3}
    assert torch.equal(pruned.generate(**prompt, **beams), masked.generate(**prompt, **beams))

    pruned.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(tokens).logits, pruned(tokens).logits)
    assert skipped_sublayers(reloaded.config) == skipped_sublayers(pruned.config)


def test_caches_hold_nothing_for_skipped_attention(llama, tokens):
    pruned = pruned_by(llama, plan_without(llama, GONE["attentions"])).model
    for cache in (DynamicCache(config=pruned.config), StaticCache(config=pruned.config, max_cache_len=40)):
        pruned(tokens[:2], past_key_values=cache)

        assert [layer.keys is None for layer in cache.layers] == [True, True, False]
        assert cache.get_seq_length() == tokens.shape[1]


def test_norms_of_a_skipped_sublayer_are_gone(llama):
    plan = plan_without(llama, [(0, "attention"), (1, "mlp")])
    names = dict(pruned_by(llama, plan).model.named_parameters())

    assert not any(name.startswith(("model.layers.0.self_attn", "model.layers.0.input")) for name in names)
    assert not any(name.startswith(("model.layers.1.mlp", "model.layers.1.post_attention")) for name in names)
    assert {"model.layers.0.post_attention_layernorm.weight", "model.layers.1.input_layernorm.weight"} <= names.keys()


@pytest.mark.parametrize(
    ("name", "gone", "stay"),
    [
        ("falcon_grouped", ["0.ln_attn", "1.ln_mlp"], ["0.ln_mlp", "1.ln_attn"]),
        (
            "falcon_alibi",
            ["0.input_layernorm", "1.post_attention_layernorm"],
            ["0.post_attention_layernorm", "1.input_layernorm"],
        ),
        ("falcon_multi_query", [], ["0.input_layernorm", "1.input_layernorm"]),
        ("stablelm", ["0.input_layernorm", "1.post_attention_layernorm"], ["1.input_layernorm"]),
        ("stablelm_parallel_query_norms", [], ["0.input_layernorm", "1.input_layernorm"]),
    ],
)
def test_a_norm_that_both_sublayers_read_stays_where_the_config_says_that_they_do(name, gone, stay):
    dense = tiny.make_model(name)
    path = find_sites(dense)[0].output_name.partition("0.")[0]
    pruned = pruned_by(dense, plan_without(dense, [(0, "attention"), (1, "mlp")])).model
    names = {parameter.removeprefix(path).removesuffix(".weight") for parameter, _ in pruned.named_parameters()}

    assert names.issuperset(stay) and names.isdisjoint(gone)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.REPRESENTATIVE)
def test_a_site_is_silent_in_the_sequences_in_which_all_its_gates_are_closed(name, tokens):
    dense = tiny.make_model(name)
    sites = find_sites(dense)
    plan = plan_without(dense, [(1, "attention"), (2, "mlp")])
    masks = {site.key: torch.ones(2, site.num_units) for site in sites}
    for key in ((1, "attention"), (2, "mlp")):
        masks[key][1] = 0
    with gated(sites, masks):
        logits = dense(tokens[:2]).logits

    torch.testing.assert_close(logits[:1], dense(tokens[:1]).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1:], without_sites(dense, plan)(tokens[1:2]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.REPRESENTATIVE)
def test_a_model_on_disk_loses_layers_bit_for_bit_as_in_memory(name, tmp_path):
    dense = tiny.make_model(name)
    dense.save_pretrained(tmp_path / "dense")
    plan = plan_without(dense, [0, (1, "mlp"), (2, "attention")], narrow=[(1, "attention")])
    weights = {}
    for place in ("memory", "disk"):
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=place == "disk")
        pruner.prune(plan=plan, reconstruction="none")
        pruner.save_pretrained(tmp_path / place)
        files = (tmp_path / place).glob("*.safetensors")
        weights[place] = {name: tensor for file in files for name, tensor in load_file(file).items()}

    assert weights["disk"].keys() == weights["memory"].keys()
    assert all(torch.equal(tensor, weights["memory"][name]) for name, tensor in weights["disk"].items())
    assert (tmp_path / "disk/config.json").read_text() == (tmp_path / "memory/config.json").read_text()


def distributed(model, folder):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize(
    "offload",
    [
        distributed,
        lambda model, folder: cpu_offload(model, torch.device("cpu")),
        lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    ],
    ids=["device_map", "cpu_offload", "disk_offload"],
)
def test_an_offloaded_model_loses_layers_as_one_in_memory(offload, llama, tokens, tmp_path):
    plan = plan_without(llama, [0, (2, "attention")])
    expected = pruned_by(copy.deepcopy(llama), plan).model
    pruned = pruned_by(offload(llama, tmp_path), plan).model

    for name, parameter in expected.named_parameters():
        assert torch.equal(read_parameter(pruned, name), parameter)
    torch.testing.assert_close(pruned(tokens).logits, expected(tokens).logits)


def test_surgery_frees_the_layers_that_are_gone(llama):
    pruned = pruned_by(llama, plan_without(llama, [1, (2, "mlp")])).model
    shared = {parameter.data_ptr() for parameter in pruned.parameters()}

    assert all(parameter.numel() == 0 or parameter.data_ptr() in shared for parameter in llama.parameters())


class TestPruningAgain:
    def test_plans_compose_after_layers_were_renumbered(self, llama, tokens, tmp_path):
        dense = copy.deepcopy(llama)
        pruner = pruned_by(llama, plan_without(llama, [0, (1, "attention")], narrow=[(2, "mlp")]))
        pruner.save_pretrained(tmp_path)
        again = FwdPruner.from_pretrained(tmp_path)
        # The last layer of the dense model is layer 1 now.
        now = plan_without(again.model, [(1, "attention")], narrow=[(1, "mlp")])
        with pytest.raises(ValueError, match="keeps no layer with attention"):
            again.prune(plan=now, reconstruction="none")
        now = plan_without(again.model, [(0, "mlp")], narrow=[(1, "mlp"), (1, "attention")])
        again.prune(plan=now, reconstruction="none")

        kept = again.plan.kept
        assert [key for key in sorted(kept) if not kept[key]] == [
            (0, "attention"),
            (0, "mlp"),
            (1, "attention"),
            (1, "mlp"),
        ]
        assert kept[2, "mlp"] == list(range(0, 64, 4))
        assert kept[2, "attention"] == [0, 2, 4]
        assert again.model.config.num_hidden_layers == 1
        at_once = pruned_by(dense, again.plan).model
        torch.testing.assert_close(at_once(tokens).logits, again.model(tokens).logits)

    @torch.no_grad()
    @pytest.mark.parametrize("low_memory", [False, True])
    def test_a_stock_checkpoint_without_layers_is_known_as_pruned_and_pruned_again(
        self, low_memory, llama, tokens, tokenizer, tmp_path
    ):
        llama.save_pretrained(tmp_path / "dense")
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=low_memory, tokenizer=tokenizer)
        pruner.prune(kinds=["layer"], method="random", sparsity=0.34, reconstruction="none")
        pruner.save_pretrained(tmp_path / "pruned")
        # The model's own method writes the record, too, and that of a copy writes the copy.
        copied = copy.deepcopy(pruner.model)
        if not low_memory:
            copied.lm_head.weight.zero_()
            copied.save_pretrained(tmp_path / "copied")
            of_copy = FwdPruner.from_pretrained(tmp_path / "copied")
            assert of_copy.plan is not None and not of_copy.model.lm_head.weight.any()

        again = FwdPruner.from_pretrained(tmp_path / "pruned", low_memory=low_memory)
        assert type(again.model) is type(llama)
        assert not list((tmp_path / "pruned").glob("*.py"))
        assert again.plan.kept == pruner.plan.kept and again.report.parameters_after == pruner.report.parameters_after
        dense = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=low_memory)
        assert dense.plan is None and dense.report is None

        now = plan_without(again.model, [(1, "attention")], narrow=[(0, "mlp")])
        again.prune(plan=now, reconstruction="none")
        again.save_pretrained(tmp_path / "again")
        composed = FwdPruner.from_pretrained(tmp_path / "again")
        first, last = sorted({key.layer for key, units in pruner.plan.kept.items() if units})
        assert composed.model.config.model_type == "pruned_llama"
        assert len(composed.plan.kept) == 6 and not composed.plan.kept[last, "attention"]
        assert composed.plan.kept[first, "mlp"] == list(range(0, 64, 2))
        expected = without_sites(llama, composed.plan)(tokens).logits
        torch.testing.assert_close(composed.model(tokens).logits, expected, rtol=1e-3, atol=1e-4)

    def test_a_model_without_a_head_stays_one(self, tmp_path):
        model = tiny.make_model("llama_gqa_biases", AutoModel)
        pruned_by(model, plan_without(model, [0])).save_pretrained(tmp_path)

        assert type(FwdPruner.from_pretrained(tmp_path).model) is type(model)

    def test_a_checkpoint_without_layers_is_opened_with_its_plan(self, llama, tmp_path):
        pruned_by(llama, plan_without(llama, [1, (2, "attention")])).save_pretrained(tmp_path)
        pruner = FwdPruner.from_pretrained(tmp_path)

        assert [site.key for site in find_sites(pruner.model)] == [(0, "attention"), (0, "mlp"), (1, "mlp")]
        assert pruner.plan is not None

    @pytest.mark.parametrize("method", ["wanda_sp", "magnitude", "flap", "taylor"])
    def test_what_is_left_is_pruned_as_any_model(self, llama, tokens, method):
        model = pruned_by(llama, plan_without(llama, [(0, "mlp"), (1, "attention")])).model
        pruner = FwdPruner(model)
        pruner.prune(tiny.request(method=method, sparsity=0.3), tokens)

        assert pruner.report.masked_difference < 1e-4
        assert len(pruner.plan.kept) == 4


class TestRefusals:
    @pytest.mark.parametrize(
        ("gone", "what"),
        [([0, 1, 2], "no layer\\."), ([(0, "attention"), (1, "attention"), 2], "no layer with attention\\.")],
    )
    def test_the_last_layer_stays(self, llama, gone, what):
        plan = plan_without(llama, gone)
        with pytest.raises(ValueError, match=f"The plan keeps {what}"):
            pruned_by(llama, plan)

    def test_layers_that_normalize_the_stream_itself_stay(self):
        model = tiny.make_model("opt_post_norm_projected")
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(ValueError, match="No whole layer of this opt can be removed"):
            pruned_by(model, plan_without(model, [1]))

        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    def test_a_plan_of_another_depth_is_refused(self, llama):
        deeper = tiny.make_model("llama_gqa_biases", num_hidden_layers=4)
        with pytest.raises(ValueError, match="The plan names 8 sites and the model has 6"):
            pruned_by(llama, plan_without(deeper, [1]))


class TestConfigs:
    def test_lists_by_layer_follow(self):
        types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
        config = Qwen3Config(num_hidden_layers=4, layer_types=types, max_window_layers=2, use_sliding_window=True)
        config.no_rope_layers, config.mlp_only_layers = [1, 1, 0, 1], [0, 3]

        assert values_of_layers(config, [1, 3]) == {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "sliding_attention"],
            "max_window_layers": 1,
            "no_rope_layers": [1, 1],
            "mlp_only_layers": [1],
        }

    def test_layers_at_intervals_cannot_be_numbered_anew(self):
        config = tiny.make_config("qwen3")
        config.decoder_sparse_step = 2
        with pytest.raises(ValueError, match=r"decoder_sparse_step is 2, .*Remove sublayers"):
            values_of_layers(config, [0, 2])
        assert values_of_layers(config, [0, 1, 2]) == {"num_hidden_layers": 3}

    def test_mixed_layer_types_survive_the_removal_of_the_layers_before_them(self, tokens):
        types = ["full_attention", "sliding_attention", "full_attention"]
        fields = {"layer_types": types, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        model = tiny.make_model("qwen3", **fields)
        plan = plan_without(model, [0])
        masked = without_sites(model, plan)
        pruned = pruned_by(model, plan).model

        assert pruned.config.layer_types == types[1:]
        torch.testing.assert_close(pruned(tokens).logits, masked(tokens).logits, rtol=1e-3, atol=1e-3)
