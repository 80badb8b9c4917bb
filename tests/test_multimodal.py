"""Multimodal models: their language model is pruned, and images still work."""

import copy
import json
import os
import subprocess

import datasets
import numpy as np
import pytest
import tiny
import tiny_multimodal
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from optimum_fwdprune import FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.architectures import layers_left
from optimum_fwdprune.export import export_stock


@pytest.fixture(params=tiny_multimodal.CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def dense(name):
    return tiny_multimodal.make_model(name)


@pytest.fixture
def tokens():
    return tiny_multimodal.text_tokens()


def generated(model, prompt):
    return model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)


def plan_without(model, *gone):
    """A plan that keeps all but some sites."""
    counts = {site.key: site.num_units for site in find_sites(model)}
    kept = {key: [] if key in gone else list(range(count)) for key, count in counts.items()}
    return PruningPlan(kept, counts, model.config.model_type, "query_head")


def is_close(actual, expected):
    return bool((actual - expected).abs().max() <= 1e-4 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masked_equals_sliced_on_text_and_on_an_image(name, dense, tokens, scope):
    pruner = FwdPruner(dense)
    request = tiny.request(sparsity=0.4, reconstruction="none", scope=scope)
    pruned = pruner.prune(request, tokens, inplace=False)
    masked, image = tiny.masked_by_hand(dense, pruner.plan), tiny_multimodal.prompt(name)

    assert all(pruner.plan.removed((layer, "mlp")) for layer in range(4))
    assert is_close(pruned(tokens[:2]).logits, masked(tokens[:2]).logits)
    expected = masked(**image).logits
    assert is_close(pruned(**image).logits, expected)
    # Both would hold if the image were not read, or if next to nothing were removed.
    assert not is_close(pruned(**tiny_multimodal.prompt(name, seed=1)).logits, expected)
    assert not is_close(dense(**image).logits, expected)


@torch.no_grad()
def test_what_is_not_the_language_model_stays_whole(name, dense, tokens):
    before = {key: value.clone() for key, value in dense.state_dict().items() if ".language_model." not in key}
    pruner = FwdPruner(dense)
    total = sum(parameter.numel() for parameter in dense.parameters())
    pruned = pruner.prune(method="flap", dataset=tokens, sparsity=0.4)
    after = {key: value for key, value in pruned.state_dict().items() if ".language_model." not in key}

    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(".language_model." in site.output_name for site in find_sites(pruned))
    assert pruner.report.parameters_before == total


@torch.no_grad()
def test_a_reloaded_model_computes_the_same_bit_for_bit_and_generates_the_same_from_an_image(
    name, dense, tokens, tmp_path
):
    pruner = FwdPruner(dense)
    pruner.prune(None, tokens, sparsity=0.4, scope="global")
    pruner.save_pretrained(tmp_path / "pruned")
    image, model = tiny_multimodal.prompt(name), pruner.model.eval()

    for reloaded in (
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned").eval(),
        FwdPruner.from_pretrained(tmp_path / "pruned").model.eval(),
    ):
        assert type(reloaded) is type(model)
        assert torch.equal(reloaded(**image).logits, model(**image).logits)
        assert torch.equal(generated(reloaded, image), generated(model, image))


@torch.no_grad()
def test_layers_and_sublayers_can_go(name, dense, tokens, tmp_path):
    gone = [(1, "attention"), (2, "mlp"), (3, "attention"), (3, "mlp")]
    plan = plan_without(dense, *gone)
    masked = tiny.masked_by_hand(dense, plan)
    pruner = FwdPruner(dense)
    pruned = pruner.prune(plan=plan, reconstruction="none").eval()
    image = tiny_multimodal.prompt(name)

    assert is_close(pruned(**image).logits, masked(**image).logits)
    pruner.save_pretrained(tmp_path / "pruned")
    reloaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(generated(reloaded, image), generated(masked, image))


@torch.no_grad()
def test_uniform_widths_and_whole_layers_are_exported_as_a_stock_checkpoint(name, dense, tokens, tmp_path):
    pruner = FwdPruner(dense)
    pruner.prune(plan=plan_without(dense, (3, "attention"), (3, "mlp")), reconstruction="none")
    pruner.prune(None, tokens, kinds=["mlp"], sparsity=0.3, layout="stock")
    export_stock(pruner.model, None, tmp_path / "stock")
    image = tiny_multimodal.prompt(name)

    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "stock").eval()
    assert not type(stock).__name__.startswith("Pruned")
    assert stock.config.get_text_config().num_hidden_layers == 3
    assert is_close(stock(**image).logits, pruner.model.eval()(**image).logits)


@torch.no_grad()
def test_a_model_on_disk_is_pruned_layer_by_layer(name, dense, tokens, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    request = tiny.request(sparsity=0.4, scope="global")
    expected = FwdPruner(dense).prune(request, tokens).eval()
    pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
    pruner.prune(request, tokens)
    pruner.save_pretrained(tmp_path / "pruned")

    reloaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned").eval()
    image = tiny_multimodal.prompt(name)
    assert is_close(reloaded(**image).logits, expected(**image).logits)


REMOTE = """
import importlib.util, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file

assert importlib.util.find_spec("optimum_fwdprune") is None
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert "transformers_modules" in type(model).__module__
    image = load_file(folder / "image.safetensors")
    with torch.no_grad():
        outputs = {"logits": model(**image).logits}
        outputs["generated"] = model.generate(**image, max_new_tokens=6, do_sample=False, pad_token_id=0)
    save_file(outputs, folder / "outputs.safetensors")
"""


@torch.no_grad()
def test_pruned_models_load_as_remote_code_where_the_package_is_not_installed(
    tokens, tmp_path, python_without_the_package
):
    expected = {}
    for name in tiny_multimodal.CONFIGS:
        folder, image = tmp_path / "checkpoints" / name, tiny_multimodal.prompt(name)
        pruner = FwdPruner(tiny_multimodal.make_model(name))
        pruner.prune(None, tokens, sparsity=0.4, reconstruction="none")
        pruner.save_pretrained(folder)
        save_file(image, folder / "image.safetensors")
        model = pruner.model.eval()
        expected[folder] = {"logits": model(**image).logits, "generated": generated(model, image)}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    script = [python_without_the_package, "-c", REMOTE, str(tmp_path / "checkpoints")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

    for folder, outputs in expected.items():
        actual = load_file(folder / "outputs.safetensors")
        assert all(torch.equal(actual[key], value) for key, value in outputs.items()), folder.name


def test_the_first_layers_of_qwen3_vl_are_not_removed_whole(tokens):
    dense = tiny_multimodal.make_model("qwen3_vl")
    with pytest.raises(ValueError, match=r"removes layer 1, and the first 2 layers .* The plan must keep"):
        FwdPruner(dense).prune(plan=plan_without(dense, (1, "attention"), (1, "mlp")))
    with pytest.raises(ValueError, match=r"Removing 3 of 4 layers .* so must the first 2 layers"):
        FwdPruner(dense).prune(method="random", kinds=["layer"], sparsity=0.75, dataset=tokens)

    for seed in range(4):
        pruner = FwdPruner(tiny_multimodal.make_model("qwen3_vl"))
        pruner.prune(method="random", kinds=["layer"], sparsity=0.5, dataset=tokens, seed=seed, reconstruction="none")
        assert layers_left(pruner.plan.kept) == [0, 1]


def test_a_processor_is_saved_with_the_model_and_loaded_with_it(tokens, tmp_path):
    processor = tiny_multimodal.make_processor("gemma3")
    tokenizer = processor.tokenizer
    pruner = FwdPruner(tiny_multimodal.make_model("gemma3"), processor)
    assert pruner.tokenizer is tokenizer
    pruner.prune(None, tokens, sparsity=0.3)
    pruner.save_pretrained(tmp_path / "pruned")

    saved = json.loads((tmp_path / "pruned" / "processor_config.json").read_text())
    assert saved["processor_class"] == "Gemma3Processor" and saved["image_seq_length"] == 4
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "pruned").get_vocab() == tokenizer.get_vocab()


IMAGE_FAMILIES = ("llava_llama", "gemma3", "qwen2_5_vl")


def rows_with_images(name, count=4):
    """Rows of text with an image of random pixels each; every second one has more text."""
    pixels = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
    place = tiny_multimodal.PLACE_OF_IMAGE[name]
    return [
        {
            "text": f"the quick {place} brown fox" + " jumps over the dog" * (number % 2),
            "image": Image.fromarray(values),
        }
        for number, values in enumerate(pixels)
    ]


def processed(processor, row):
    return dict(processor(text=[row["text"]], images=[[row["image"]]], return_tensors="pt"))


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_statistics_count_the_positions_of_text_and_images(name, dense):
    processor, rows = tiny_multimodal.make_processor(name), rows_with_images(name)
    scores = FwdPruner(dense, processor).score(dataset=rows, method="wanda_sp", kinds=["mlp"], batch_size=3)
    seen = []
    site = next(site for site in find_sites(dense) if site.key == (2, "mlp"))
    handle = site.projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, -2)))
    # One row at a time, so that none has padding.
    lengths = [len(dense(**processed(processor, row)).logits[0]) for row in rows]
    handle.remove()
    inputs = torch.cat(seen).double()

    assert lengths[1] > lengths[0] and scores.statistics[site.key].count == sum(lengths)
    assert torch.allclose(scores.statistics[site.key].mean.double(), inputs.mean(0), atol=1e-5)
    assert scores.calibration.num_tokens == sum(lengths)
    # The images matter.
    others = [{**row, "image": rows[0]["image"]} for row in rows]
    same_text = FwdPruner(dense, processor).score(dataset=others, method="wanda_sp", kinds=["mlp"])
    assert not torch.allclose(same_text.statistics[site.key].mean.double(), inputs.mean(0), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_a_model_is_pruned_and_refitted_on_images(name, dense, tmp_path):
    processor, rows = tiny_multimodal.make_processor(name), rows_with_images(name, 8)
    request = {
        "method": "wanda_sp",
        "kinds": ["mlp"],
        "sparsity": 0.4,
        "reconstruction": "least_squares",
        "batch_size": 3,
    }
    batches = [processed(processor, row) for row in rows]
    pruned = {
        fit: FwdPruner(copy.deepcopy(dense), processor).prune(dataset=data, **{**request, "reconstruction": fit})
        for fit, data in (("none", rows), ("least_squares", batches))
    }

    def error(model):
        wanted, actual = ([model(**batch).logits for batch in batches] for model in (dense, model.eval()))
        return sum((one - other).square().sum() for one, other in zip(wanted, actual))

    assert error(pruned["least_squares"]) < error(pruned["none"])
    # Layer by layer from the disk.
    dense.save_pretrained(tmp_path / "dense")
    pruner = FwdPruner.from_pretrained(tmp_path / "dense", tokenizer=processor, low_memory=True)
    from_disk = pruner.prune(dataset=rows, **request)
    assert is_close(from_disk(**batches[0]).logits, pruned["least_squares"](**batches[0]).logits)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_a_dataset_is_read_before_and_after_a_processor_was_mapped_over_it(name, dense):
    processor, rows = tiny_multimodal.make_processor(name), rows_with_images(name)
    data = datasets.Dataset.from_list(rows)
    # Some inputs of Qwen2.5-VL have no axis of rows. The columns of the text and the image are still there.
    flat = ("input_ids", "attention_mask", "image_grid_thw", *(["pixel_values"] if name == "llava_llama" else []))

    def without_axis(row):
        return {key: value[0] if key in flat else value for key, value in processed(processor, row).items()}

    made = [data, data.map(lambda row: processed(processor, row)), data.map(without_axis)]
    request = {"method": "wanda_sp", "kinds": ["mlp"]}
    wanted, *scores = (FwdPruner(dense, processor).score(dataset=each, **request) for each in (rows, *made))
    assert all(torch.equal(each.values[key], wanted.values[key]) for each in scores for key in wanted.values)


def test_rows_with_images_that_cannot_be_read_are_refused():
    dense, processor = tiny_multimodal.make_model("llava_llama"), tiny_multimodal.make_processor("llava_llama")
    rows = rows_with_images("llava_llama")
    row = processed(processor, rows[0])
    batch = dict(processor(text=[row["text"] for row in rows[::2]], images=[[r["image"]] for r in rows[::2]]))
    cases = [
        (None, rows, {}, "needs the processor of the model"),
        (processor, rows, {"seq_len": 4}, r"4 of 4 rows with images have more than seq_len=4 tokens; the longest has"),
        (processor, [{"image": rows[0]["image"], "label": 3}], {}, r"cannot read row 0.*columns image, label"),
        (processor, [{**row, "input_ids": "the"}], {}, "Row 0 has values that are no tensors"),
        (processor, [batch], {}, "Row 0 is a batch of 2 texts, whose images cannot be told apart"),
    ]
    for tool, dataset, fields, message in cases:
        with pytest.raises(ValueError, match=message):
            FwdPruner(dense, tool).prune(method="wanda_sp", dataset=dataset, **fields)
    with pytest.raises(ValueError, match="qwen3_vl adds features of images to the residual stream between its layers"):
        FwdPruner(tiny_multimodal.make_model("qwen3_vl"), processor).prune(method="wanda_sp", dataset=rows)


def test_the_loss_is_computed_of_text_alone():
    dense, processor = tiny_multimodal.make_model("llava_llama"), tiny_multimodal.make_processor("llava_llama")
    with pytest.raises(ValueError, match=r"the data has pixel_values\. Use a method that measures"):
        FwdPruner(dense, processor).prune(method="taylor", dataset=rows_with_images("llava_llama"))


def test_images_beside_tokens_are_refused_where_text_is_read(tokens):
    text_model = FwdPruner(tiny.make_model("llama_mqa"))
    with pytest.raises(ValueError, match=r"The data has pixel_values beside input_ids\. Images are"):
        text_model.prune(None, [{"input_ids": [1, 2, 3], "pixel_values": torch.zeros(3, 4, 4)}])


def test_a_language_model_that_the_family_does_not_support_is_refused():
    config = transformers.LlavaConfig(
        text_config=tiny.make_config("qwen2"),
        vision_config=tiny_multimodal.CONFIGS["llava_llama"]().vision_config,
        image_token_index=tiny_multimodal.IMAGE,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"'qwen2'.*Supported are llama, mistral"):
        FwdPruner(model)
