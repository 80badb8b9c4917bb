"""Speed that tells a large model from a small one, sizes that are exact, and reasons where nothing is gained."""

import itertools
import json
import math

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import (
    Evaluation,
    PeakMemory,
    Spread,
    TaskScore,
    TextLoss,
    benchmark,
    compare,
    slower_because,
)
from optimum_fwdprune.evaluation.comparison import Comparison


SMALL = {"prompt_tokens": (32,), "new_tokens": 4, "repeats": 3}


def pruned_twin(name="llama_gqa_biases", **fields):
    calibration = torch.randint(0, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))
    return FwdPruner(tiny.make_model(name)).prune(tiny.request(reconstruction="none", **fields), calibration)


def test_a_model_of_many_times_the_work_is_slower():
    models = [tiny.make_model("llama_mha_tied", num_hidden_layers=layers) for layers in (1, 24)]
    small, large = benchmark(models, **SMALL)

    assert small.timings[0].prefill_tokens_per_second > 2 * large.timings[0].prefill_tokens_per_second > 0
    assert small.timings[0].decode_tokens_per_second > 2 * large.timings[0].decode_tokens_per_second > 0


def test_every_pair_of_sizes_is_timed_with_its_spread():
    (found,) = benchmark([tiny.make_model("bloom")], (1, 3), (8, 16), new_tokens=2, repeats=3)

    assert [(each.batch_size, each.prompt_tokens) for each in found.timings] == [(1, 8), (1, 16), (3, 8), (3, 16)]
    for timing in found.timings:
        for spread in (timing.prefill, timing.decode):
            assert 0 < spread.low <= spread.median <= spread.high
        assert timing.prefill_tokens_per_second == pytest.approx(
            timing.batch_size * timing.prompt_tokens / timing.prefill.median
        )


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_models_are_timed_where_they_compute(offload, tmp_path):
    folder = (tmp_path,) if offload is disk_offload else ()
    model = offload(tiny.make_model("llama_mqa"), *folder, execution_device=torch.device("cpu"))

    resident, offloaded = benchmark([tiny.make_model("llama_mqa"), model], prompt_tokens=[8], new_tokens=1, repeats=1)

    assert offloaded.bytes == resident.bytes
    assert offloaded.macs_per_token == resident.macs_per_token


def test_time_is_what_the_clock_says():
    # It goes on by a second whenever it is looked at.
    (found,) = benchmark([tiny.make_model("bloom")], (1,), (8,), new_tokens=4, clock=itertools.count().__next__)

    assert found.timings[0].prefill == Spread(1, 1, 1) and found.timings[0].decode == Spread(0.25, 0.25, 0.25)


def test_sizes_are_those_of_the_weights_on_disk(architecture_name, tmp_path):
    model = tiny.make_model(architecture_name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    (found,) = benchmark([model], prompt_tokens=(8,), new_tokens=1, repeats=1)

    assert found.parameters == sum(tensor.numel() for tensor in saved.values())
    assert found.bytes == sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    assert found.peak_bytes >= found.bytes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_multiplications_are_counted_by_hand(attention):
    """Attention's own products included, which weights do not show and some kernels hide from the counter."""
    model = tiny.make_model("llama_mha_tied")
    model.set_attn_implementation(attention)
    (found,) = benchmark([model], prompt_tokens=(32,), new_tokens=1, repeats=1)
    linears = 3 * (4 * 48 * 48 + 3 * 48 * 64)
    attended = 3 * 2 * 48 * 32
    # Only the last token's logits are needed.
    assert found.macs_per_token == pytest.approx(linears + attended + 300 * 48 / 32, rel=1e-3)


def test_peak_memory_is_what_the_work_held():
    with PeakMemory(torch.device("cpu")) as peak:
        held = torch.ones(2**24)
        del held

    assert 0.9 * 2**26 < peak.bytes < 1.5 * 2**26


def test_memory_that_was_freed_before_counts_when_it_is_used_again():
    # Once a block as large was freed, glibc keeps those of its size.
    torch.ones(2**22)
    held, last = [torch.ones(2**18) for _ in range(200)], torch.ones(1000)
    del held
    with PeakMemory(torch.device("cpu")) as peak:
        held = [torch.ones(2**18) for _ in range(100)]
    assert 0.9 * 2**20 * 100 < peak.bytes < 1.5 * 2**20 * 100
    del held, last


def test_peak_memory_is_sampled_where_the_kernel_keeps_no_mark(monkeypatch):
    import time

    monkeypatch.setattr("optimum_fwdprune.evaluation.memory._reset_high_water", lambda: False)
    with PeakMemory(torch.device("cpu")) as peak:
        held = torch.ones(2**24)
        time.sleep(0.1)
        del held

    assert 0.9 * 2**26 < peak.bytes < 1.5 * 2**26


class TestReasons:
    """Why a pruned model is no faster; the clock is made up."""

    @pytest.fixture
    def reasons(self, monkeypatch):
        def of(pruned, dense=None, ratio=1.0):
            dense = dense or tiny.make_model("llama_gqa_biases")
            seconds = {id(dense): 1.0, id(pruned): 1 / ratio}
            monkeypatch.setattr(
                "optimum_fwdprune.evaluation.speed._generate", lambda model, *_: (seconds[id(model)],) * 2
            )
            return slower_because(dense, pruned, *benchmark([dense, pruned], **SMALL))

        return of

    def test_nothing_is_said_of_a_faster_model(self, reasons):
        assert reasons(pruned_twin(sparsity=0.5), ratio=1.5) == []

    def test_too_little_was_saved(self, reasons):
        prefill, decode = reasons(pruned_twin(sparsity=0.01))

        assert "prefill of 1 x 32 tokens is 1.00 times as fast; it saves only" in prefill
        assert "of which 1% were removed" in decode or "of which 0% were removed" in decode

    def test_odd_widths(self, reasons):
        (prefill, _) = reasons(pruned_twin(sparsity=0.5, kinds=["mlp"], mlp_sparsity=0.7))

        assert "widths that are no multiple of 8" in prefill and "multiple_of=64" in prefill

    def test_even_widths_that_gain_nothing_were_too_small_to_tell(self, reasons):
        (prefill, _) = reasons(pruned_twin(kinds=["mlp"], mlp_sparsity=0.5, multiple_of=8))

        assert "fixed costs exceed those of computations of this size" in prefill

    def test_the_user_is_warned(self, reasons, monkeypatch):
        said = []
        monkeypatch.setattr(
            "optimum_fwdprune.evaluation.speed.logger.warning", lambda text, *args: said.append(text % args)
        )
        reasons(pruned_twin(sparsity=0.01))

        assert len(said) == 2 and said[0].startswith("model 2 is not faster than model 1: prefill")

    def test_names_of_models_are_in_the_warning(self, monkeypatch):
        said = []
        monkeypatch.setattr(
            "optimum_fwdprune.evaluation.speed.logger.warning", lambda text, *args: said.append(text % args)
        )
        monkeypatch.setattr("optimum_fwdprune.evaluation.speed.NOT_FASTER", 1e6)
        models = {"whole": tiny.make_model("llama_mqa"), "same": tiny.make_model("llama_mqa")}
        assert len(benchmark(models, prompt_tokens=[4], new_tokens=1, repeats=1)) == 2
        assert said and all(text.startswith("same is not faster than whole: ") for text in said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": (120,), "new_tokens": 9}, "120 prompt tokens and 9 new ones are more than the 128"),
        ({"repeats": -1}, "repeats must be at least 0; got -1"),
        ({"batch_sizes": (1, 0)}, "must be at least 1"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark([tiny.make_model("llama_gqa_biases")], **{"prompt_tokens": (8,), **options})
    with pytest.raises(ValueError, match="no model"):
        benchmark([])


class TestComparison:
    @pytest.fixture
    def comparison(self, tokenizer):
        models = {"dense": tiny.make_model("llama_gqa_biases"), "pruned": pruned_twin(sparsity=0.5)}
        texts = {"foxes": ["the quick brown fox ", "jumps over the lazy dog"], "dogs": ["the lazy dog and the fox"]}
        return compare(models, tokenizer, texts, batch_sizes=(1, 2), **SMALL)

    def test_every_format_shows_the_same_figures(self, comparison, tmp_path):
        import csv

        for ending in ("md", "json", "csv"):
            comparison.save(tmp_path / f"table.{ending}")
        document = json.loads((tmp_path / "table.json").read_text())
        rows = list(csv.DictReader((tmp_path / "table.csv").open()))
        lines = (tmp_path / "table.md").read_text().splitlines()
        cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}

        assert [each["name"] for each in document] == [row["model"] for row in rows] == ["dense", "pruned"]
        for each, row, place in zip(document, rows, (0, 1)):
            assert int(row["parameters"]) == each["benchmark"]["parameters"]
            assert cells["parameters"][place] == f"{each['benchmark']['parameters']:,}"
            loss = each["texts"]["foxes"]
            assert float(row["perplexity, foxes"]) == pytest.approx(math.exp(loss["nll"] / loss["tokens"]))
            assert cells["perplexity, foxes"][place] == f"{float(row['perplexity, foxes']):.2f}"
            median = each["benchmark"]["timings"][1]["prefill"]["median"]
            assert float(row["prefill 2 x 32, ms"]) == pytest.approx(1e3 * median)
        assert float(rows[0]["prefill 1 x 32, times as fast"]) == 1
        assert float(rows[1]["decode 2 x 32, times as fast"]) == pytest.approx(
            float(rows[1]["decode 2 x 32, tokens/s"]) / float(rows[0]["decode 2 x 32, tokens/s"])
        )
        assert "perplexity, dogs" in str(comparison)

    def test_scores_of_tasks_stand_with_their_errors(self):
        scores = [TaskScore("piqa", "acc", 0.625, 0.028, 300), TaskScore("gsm", "exact", 0.5, None, 4)]
        table = Comparison([Evaluation("dense", {"wiki": TextLoss(20.0, 10)}, scores)]).to_markdown()

        assert "| piqa, acc | 0.625 ± 0.028 |" in table and "| gsm, exact | 0.500 |" in table
        assert f"| perplexity, wiki | {math.exp(2):.2f} |" in table

    def test_models_of_different_vocabularies_are_refused(self, tokenizer):
        models = {"one": tiny.make_model("bloom"), "other": tiny.make_model("bloom", vocab_size=310)}
        with pytest.raises(ValueError, match="one 300, other 310"):
            compare(models, tokenizer)

    def test_unknown_formats_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"table.xlsx must end in one of .md, .json, .csv"):
            Comparison([]).save(tmp_path / "table.xlsx")


def test_without_repeats_nothing_is_timed(monkeypatch):
    models = [tiny.make_model("llama_mqa", seed=seed) for seed in range(2)]
    timed = benchmark(models, prompt_tokens=(8,), new_tokens=1, repeats=1)
    monkeypatch.setattr("optimum_fwdprune.evaluation.speed._take_turns", lambda *_: pytest.fail("timed"))
    found = benchmark(models, prompt_tokens=(8,), new_tokens=1, repeats=0)

    assert [each.timings for each in found] == [[], []]
    names = ("parameters", "bytes", "macs_per_token")
    assert [[getattr(each, name) for name in names] for each in found] == [
        [getattr(each, name) for name in names] for each in timed
    ]
    assert not any(
        "times as fast" in name for name in compare({"a": models[0]}, None, prompt_tokens=(8,), repeats=0).figures()[0]
    )
