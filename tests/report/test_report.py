"""A report says what the checkpoint's files say, and its page shows nothing but its JSON file."""

import dataclasses
import html.parser
import io
import json
import re
import shutil

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan
from optimum_fwdprune.evaluation import Benchmark, Comparison, Evaluation, Spread, TextLoss, Timing
from optimum_fwdprune.record.command import command_of
from optimum_fwdprune.record.record import OUTCOME_NAME
from optimum_fwdprune.report import pictures, render_table, report_table
from optimum_fwdprune.report.canvas import PALETTE
from optimum_fwdprune.report.document import describe, describe_checkpoint, document_of, measured_of, models_of
from optimum_fwdprune.report.figures import pictures_of, pictures_of_all
from optimum_fwdprune.report.learning import learning_of
from optimum_fwdprune.report.numbers import WAYS
from optimum_fwdprune.report.page import DARK, render_page, to_json, write_page
from optimum_fwdprune.scoring.scores import SCORES_NAME


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokens):
    """Checkpoints of a tiny model: scored, learned, searched, in rounds, and from a plan alone."""
    folder = tmp_path_factory.mktemp("checkpoints")
    requests = {
        "scored": {"sparsity": 0.4},
        "learned": {"method": "policy_gradient", "sparsity": 0.3, "steps": 30},
        "searched": {"scope": "search", "search_windows": 100},
        "rounds": {"method": "magnitude", "rounds": 2, "sparsity": 0.4},
        # One query head per group is left, which then owns keys and values alone.
        "heads": {"method": "random", "kinds": ["attention"], "sparsity": 0.16},
    }
    for name, fields in requests.items():
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(tiny.request(**fields), tokens)
        pruner.save_pretrained(folder / name)
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(plan=PruningPlan.load(folder / "scored"))
    pruner.save_pretrained(folder / "replayed")
    return folder


def measured(*names):
    """A comparison whose every figure differs."""
    found = []
    for place, name in enumerate(names):
        timing = Timing(1, 64, *(Spread(0.1 / (place + k), 0.05, 0.2) for k in (1, 2)))
        speed = Benchmark(
            parameters=10**6 - place, bytes=10**7 - place, macs_per_token=5e5, peak_bytes=10**8, timings=[timing]
        )
        found.append(Evaluation(name, {"text": TextLoss(300.0 + 20 * place, 100)}, [], speed))
    return Comparison(found)


def at(document, path):
    for step in path:
        document = document[step]
    return document


class Numbers(html.parser.HTMLParser):
    """Every number of a page: where in the JSON it stands, its exact value, how it is written, and what is shown."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.is_open = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "data":
            given = dict(attributes)
            self.found.append([json.loads(given["data-at"]), json.loads(given["value"]), given["data-way"], ""])
            self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = self.is_open and tag != "data"

    def handle_data(self, text):
        if self.is_open:
            self.found[-1][-1] += text


@pytest.fixture(scope="module")
def document(folder):
    comparison = measured("dense", "scored", "learned")
    return document_of([describe_checkpoint(folder / name, comparison.of(name)) for name in ("scored", "learned")])


@pytest.fixture(scope="module")
def page(document):
    return render_page(document)


class TestThePage:
    def test_shows_the_figures_of_the_json_file_and_no_others(self, document, page, tmp_path, monkeypatch):
        monkeypatch.setattr("optimum_fwdprune.report.page.render_page", lambda given: page)
        figures = write_page(document, tmp_path / "report.html")
        read = json.loads(figures.read_text())

        assert figures == tmp_path / "report.json" and read == document
        assert (tmp_path / "report.html").read_text() == page
        numbers = Numbers(page).found
        assert len(numbers) > 90
        for path, value, way, text in numbers:
            assert at(read, path) == value, path
            assert text == WAYS[way](value), path
        shown = {json.dumps(path) for path, *_ in numbers}
        assert json.dumps(["checkpoints", 0, "measured", "pruned", "figures", "perplexity, text"]) in shown
        assert json.dumps(["checkpoints", 1, "sizes", "parameters", "after"]) in shown

    def test_depends_on_the_json_file_alone(self, document, page):
        """Pictures included: the page of what the file says is the page."""
        assert render_page(json.loads(to_json(document))) == page

    def test_every_picture_is_drawn_from_it(self, document):
        changed = json.loads(to_json(document))
        for checkpoint in changed["checkpoints"]:
            checkpoint["layers"][1]["attention"].update(kept=1)
            checkpoint["layers"][1]["mlp"]["parameters"]["after"] = 1
            checkpoint["layers"][1]["mlp"].update(kept=1)
            for spread in checkpoint["scores"].values():
                spread["kept"].reverse()
                spread["layers"][0]["q50"] *= 1.1
            checkpoint["measured"]["pruned"]["figures"]["perplexity, text"] += 10
        learning = changed["checkpoints"][1]["learning"]
        for name in ("smooth_loss", "entropy"):
            learning[name] = [0.5 * value for value in learning[name]]
        for rates in learning["keep_rates"].values():
            rates["1"] = [0.0] * len(rates["1"])
        before, after = (
            {
                (place, picture.title): picture.svg
                for place, drawn in enumerate(
                    [pictures_of_all(found, models_of(found)), *pictures_of(found["checkpoints"][1], "c1").values()]
                )
                for picture in drawn
            }
            for found in (document, changed)
        )

        assert before.keys() == after.keys() and len(before) == 12
        assert [name for name, svg in before.items() if after[name] == svg] == []

    def test_quality_stands_against_size_where_speed_was_not_measured(self, folder):
        comparison = Comparison([Evaluation(name, {"text": TextLoss(9.0, 9)}, []) for name in ("dense", "x")])
        document = document_of([describe_checkpoint(folder / name, comparison) for name in ("scored", "learned")])
        drawn = pictures_of_all(document, models_of(document))

        assert [picture.title for picture in drawn[:2]] == ["Quality against size", "Kept attention units"]

    def test_asks_nobody_for_anything(self, page):
        assert "<script" not in page
        assert set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)

    def test_takes_every_colour_of_its_pictures_from_its_theme(self, page):
        """So that they follow it into the dark; heat maps have a scale of their own."""
        drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))

        assert DARK.keys() == PALETTE.keys()
        assert set(re.findall(r"var\(--(\w+)\)", drawings)) - {"font"} <= PALETTE.keys()
        assert not re.findall(r"(?:fill|stroke): #\w+", drawings)

    def test_identifiers_are_unique(self, page):
        found = re.findall(r' id="([^"]+)"', page)

        assert len(found) == len(set(found))

    def test_names_are_text_whatever_they_hold(self, folder):
        found = describe_checkpoint(folder / "scored", name="<b>&\"'")

        assert "<b>&\"'" not in render_page(document_of([found]))

    def test_an_existing_file_is_kept_unless_told_otherwise(self, document, tmp_path, monkeypatch):
        monkeypatch.setattr("optimum_fwdprune.report.page.render_page", lambda _: "page")
        (tmp_path / "report.json").write_text("mine")
        with pytest.raises(FileExistsError, match=r"report\.json exists.*overwrite"):
            write_page(document, tmp_path / "report.html")
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

        write_page(document, tmp_path / "report.html", overwrite=True)
        assert json.loads((tmp_path / "report.json").read_text()) == document


class TestACheckpoint:
    def test_sizes_are_those_of_the_dense_and_of_the_pruned_model(self, folder):
        for name in ("scored", "heads", "replayed"):
            found = describe_checkpoint(folder / name)
            dense, pruned = tiny.make_model("llama_gqa_biases"), FwdPruner.from_pretrained(folder / name).model
            sizes = found["sizes"]
            before, after = (sum(weight.numel() for weight in model.parameters()) for model in (dense, pruned))
            removed = sum(
                row[kind]["parameters"]["before"] - row[kind]["parameters"]["after"]
                for row in found["layers"]
                for kind in ("attention", "mlp")
            )
            assert (sizes["parameters"]["before"], sizes["parameters"]["after"]) == (before, after)
            assert sizes["bytes"] == {**sizes["parameters"], "before": 4 * before, "after": 4 * after}
            assert removed == before - after == sizes["prunable"]["before"] - sizes["prunable"]["after"]

    def test_older_checkpoints_say_the_same_of_sizes(self, folder, tmp_path):
        """They do not carry what came of their pruning; the dense model's config tells."""
        for name in ("scored", "heads"):
            now = describe_checkpoint(folder / name)
            shutil.copytree(folder / name, tmp_path / name)
            (tmp_path / name / OUTCOME_NAME).unlink()
            older = describe_checkpoint(tmp_path / name)

            assert (older["sizes"], older["layers"]) == (now["sizes"], now["layers"])
            assert older["pruning"]["masked_difference"] is None and older["pruning"]["seconds"] == {}
            assert "not recorded" in render_page(document_of([older]))

    def test_layers_keep_what_the_plan_keeps(self, folder):
        plan = PruningPlan.load(folder / "learned")
        for row in describe_checkpoint(folder / "learned")["layers"]:
            for kind in ("attention", "mlp"):
                assert row[kind]["kept"] == len(plan.kept[(row["layer"], kind)])
                assert row[kind]["units"] == plan.num_units[(row["layer"], kind)]

    def test_scores_are_counted_once_each(self, folder):
        found = describe_checkpoint(folder / "scored")
        for kind in ("attention", "mlp"):
            spread = found["scores"][kind]
            for part in ("kept", "units"):
                counted = (
                    spread["kept"]
                    if part == "kept"
                    else [sum(pair) for pair in zip(spread["kept"], spread["removed"])]
                )
                assert sum(counted) == sum(row[kind][part] for row in found["layers"])
            assert spread["edges"] == sorted(spread["edges"])

    def test_after_rounds_kept_and_removed_scores_are_not_told_apart(self, folder):
        spread = describe_checkpoint(folder / "rounds")["scores"]["mlp"]

        assert "kept" not in spread and sum(spread["all"]) > 0

    def test_learning_is_shown_where_there_was_any(self, folder):
        learned, searched = (describe_checkpoint(folder / name)["learning"] for name in ("learned", "searched"))

        assert len(learned["loss"]) == 30 and not learned["is_search"]
        assert searched["is_search"] and searched["loss"][-1] <= searched["loss"][0]
        drawn = pictures_of(describe_checkpoint(folder / "searched"), "c")["learning"]
        assert "sweep" in drawn[0].svg and "divergence from dense" in drawn[0].svg
        assert describe_checkpoint(folder / "scored")["learning"] is None

    def test_a_history_of_losses_alone_is_shown(self, folder):
        """Methods of others may learn without masks."""
        learning = learning_of({"loss": torch.tensor([3.0, float("nan"), 1.0])})
        found = {**describe_checkpoint(folder / "scored"), "learning": {"is_search": False, **learning}}

        assert learning["loss"] == [3.0, None, 1.0] and learning["entropy"] is None
        json.dumps(found, allow_nan=False)
        drawn = pictures_of(found, "c")["learning"]
        assert [picture.title for picture in drawn] == ["Loss", "Attention keep rates", "MLP keep rates"]
        assert "not pruned" in drawn[1].svg

    def test_what_a_broken_model_measures_is_shown_as_it_is(self, folder):
        comparison = Comparison([Evaluation(name, {"text": TextLoss(float("nan"), 9)}, []) for name in ("dense", "x")])
        document = document_of([describe_checkpoint(folder / "scored", comparison)] * 2)

        assert ">nan</data>" in render_page(json.loads(to_json(document)))
        assert "nan" in report_table(document)

    def test_long_runs_are_thinned_to_means(self):
        steps = 1000
        history = {"loss": torch.arange(steps).float(), "entropy": torch.ones(steps)}
        history |= {"expected_sparsity": torch.ones(steps), "keep_rate.0.mlp": torch.arange(steps).float()}
        found = learning_of(history, points=100)

        assert found["steps"] == list(range(10, 1001, 10)) and found["stretch"] == 10
        assert found["loss"][0] == 4.5 and found["loss"][-1] == 994.5
        assert found["smooth_loss"][-1] == 974.5
        assert found["keep_rates"] == {"attention": {}, "mlp": {"0": [float(step - 1) for step in found["steps"]]}}

    def test_what_is_not_known_is_said_to_be_not(self, folder):
        replayed = describe_checkpoint(folder / "replayed")
        page = render_page(document_of([replayed]))

        assert replayed["scores"] is None and replayed["measured"] is None
        assert "This checkpoint has no scores" in page and page.count("not measured") >= 3
        assert "not measured" in report_table(document_of([replayed]))

    def test_what_was_measured_is_saved_with_the_checkpoint(self, folder, tmp_path, tokens):
        pruner = FwdPruner.from_pretrained(folder / "scored")
        pruner.comparison = measured("dense", "this")
        pruner.save_pretrained(tmp_path / "out")
        found = describe_checkpoint(tmp_path / "out")["measured"]

        assert found == measured_of(pruner.comparison)
        assert found["dense"]["figures"]["prefill 1 x 64, times as fast"] == 1
        again = FwdPruner.from_pretrained(tmp_path / "out")
        assert again.comparison == pruner.comparison
        again.prune(tiny.request(sparsity=0.1, method="magnitude"))
        assert again.comparison is None

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: (path / "config.json").unlink(), "has no config.json"),
            (lambda path: (path / "fwdprune_plan.json").unlink(), "has no fwdprune_plan.json: it is dense"),
            (lambda path: (path / "fwdprune_plan.json").write_text("{}"), "fwdprune_plan.json is not a pruning plan"),
            (lambda path: (path / "fwdprune_config.json").write_text("{"), "fwdprune_config.json is not JSON"),
            (lambda path: (path / SCORES_NAME).write_bytes(b"\xff" * 64), "scores.safetensors holds no scores"),
            (lambda path: (path / OUTCOME_NAME).write_text("[]"), "outcome.json must hold a JSON object"),
            (lambda path: (path / OUTCOME_NAME).write_text('{"report": {"seconds": {}}}'), "outcome.json is damaged"),
            (lambda path: (path / OUTCOME_NAME).write_text('{"comparison": [{}]}'), "KeyError"),
        ],
    )
    def test_missing_and_damaged_files_are_named(self, folder, tmp_path, damage, message):
        shutil.copytree(folder / "scored", tmp_path / "out")
        damage(tmp_path / "out")

        with pytest.raises(ValueError, match=message):
            describe_checkpoint(tmp_path / "out")

    def test_a_plan_of_another_model_is_refused(self, folder, tmp_path):
        shutil.copytree(folder / "scored", tmp_path / "out")
        shutil.copy(folder / "learned" / "fwdprune_plan.json", tmp_path / "out")

        with pytest.raises(ValueError, match=r"out: Layer .* the plan keeps"):
            describe_checkpoint(tmp_path / "out")

    def test_weights_and_request_may_be_missing(self, folder, tmp_path):
        shutil.copytree(folder / "scored", tmp_path / "out")
        (tmp_path / "out" / "model.safetensors").unlink()
        (tmp_path / "out" / "fwdprune_config.json").unlink()
        found = describe_checkpoint(tmp_path / "out")

        assert found["request"] is None and found["sizes"] == describe_checkpoint(folder / "scored")["sizes"]
        assert "The request was not recorded" in render_page(document_of([found]))


def test_every_architecture_is_described(dense, tokens, tmp_path):
    pruner = FwdPruner(dense)
    before = sum(weight.numel() for weight in dense.parameters())
    pruner.prune(tiny.request(method="magnitude", sparsity=0.3, reconstruction="bias"), tokens)
    pruner.save_pretrained(tmp_path / "out")
    with_outcome = describe_checkpoint(tmp_path / "out")
    (tmp_path / "out" / OUTCOME_NAME).unlink()

    assert with_outcome["sizes"]["parameters"]["before"] == before
    assert describe_checkpoint(tmp_path / "out")["sizes"] == with_outcome["sizes"]


@pytest.mark.parametrize("method", tiny.methods_of_dense_models())
def test_every_method_is_described(method, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(method=method, sparsity=0.3, **tiny.SHORT.get(method, {})), tokens)
    found = describe("mine", pruner.report.record)

    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["method"] == method and found["scores"].keys() == set(tiny.kinds_scored_by(method)) - {"layer"}
    assert found["request"] == pruner.config.to_dict()
    assert (found["learning"] is not None) == (method == "policy_gradient")


def test_the_pruner_writes_its_report(tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(sparsity=0.3), tokens)
    figures = pruner.report.save(tmp_path / "report.html", name="mine", comparison=measured("dense", "mine"))
    (found,) = json.loads(figures.read_text())["checkpoints"]

    assert found["sizes"]["parameters"]["after"] == pruner.report.parameters_after
    assert found["name"] == "mine" and found["measured"] == measured_of(measured("dense", "mine"))
    assert ">mine</h1>" in (tmp_path / "report.html").read_text()


def test_the_pruners_report_is_that_of_the_checkpoint(folder, tmp_path, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(sparsity=0.3), tokens)
    pruner.save_pretrained(tmp_path / "out")
    reloaded = FwdPruner.from_pretrained(tmp_path / "out")
    described = [describe("x", each.report.record) for each in (pruner, reloaded)]

    assert described[0] == described[1] == describe_checkpoint(tmp_path / "out", name="x")
    assert str(reloaded.report) == str(pruner.report)
    assert reloaded.report == dataclasses.replace(pruner.report, record=None)


def test_tables_show_checkpoints_side_by_side_and_each_alone(document):
    text = report_table(document)

    assert re.search(r"D dense .* 1\.00. .* 20\.09", text)
    assert re.search(r"1 scored .* 2\.00.", text)
    assert "1 scored: a dense model pruned by wanda_sp" in text
    assert text.count("its calibration data was passed to prune(dataset=...) in Python.") == 2


@pytest.mark.parametrize(("rows", "share"), [(4000, "90.3%"), (64, None)])
def test_parameters_outside_of_units_are_named_where_they_are_many(rows, share, tmp_path, monkeypatch):
    said = []
    model = tiny.make_model("llama_mqa", vocab_size=rows)
    pruner = FwdPruner(model)
    # The forecast is logged.
    monkeypatch.setattr("optimum_fwdprune.planning.settler.announce", said.append)
    pruner.prune(tiny.request(method="magnitude", reconstruction="none"))
    pruner.save_pretrained(tmp_path / "pruned")
    document = document_of([describe_checkpoint(tmp_path / "pruned")])
    card = (tmp_path / "pruned" / "README.md").read_text()

    for text in (said[0], str(pruner.report), report_table(document), html.unescape(render_page(document)), card):
        assert ("belong to no unit of the kinds that are pruned" in text) == (share is not None)
        assert share is None or f"{share} of the model's parameters" in text
    of_all = f"{-pruner.report.model_sparsity:+.1%}"
    assert f"parameters ({of_all})." in card and f"| {of_all} |" in card
    assert of_all in said[0]


def test_names_of_texts_are_no_formulas():
    figure = pictures.new_figure(3, 3)
    pictures.draw_points(figure.subplots(), [("1", False, 1.0, 2.0)], "x", "perplexity, pay$x^{$.txt")
    figure.savefig(io.BytesIO(), format="svg")


def test_a_plan_that_was_replayed_is_made_again_by_replaying_it(tokens):
    source = FwdPruner(tiny.make_model("llama_gqa_biases"))
    source.prune(tiny.request(method="random", sparsity=0.5, reconstruction="none"))
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(plan=source.plan)
    for each, words in ((source, "--method random"), (pruner, "--plan fwdprune_plan.json")):
        command = command_of(each.config, plan=each.plan)
        assert words in command and ("--method" in command) == (each is source)


@pytest.mark.parametrize(
    ("budget", "shown"),
    [
        ({}, "--sparsity 0.2"),
        ({"sparsity": 0.3}, "--sparsity 0.3"),
        ({"target_bytes": 500}, "--target_bytes 500"),
        ({"max_divergence": 0.5}, "--max_divergence 0.5"),
    ],
    ids=str,
)
def test_the_command_shows_the_budget_also_where_it_is_the_default(budget, shown):
    for request in (None, PruningConfig(sparsity=0.4)):
        command = command_of(PruningConfig.of(request, **budget))
        if budget or request is None:
            assert shown in command
            assert sum(command.count(name) for name in ("--sparsity", "--target", "--max_")) == 1


def test_a_dense_model_that_is_called_alike_elsewhere_is_not_the_checkpoint():
    compared = Comparison([Evaluation(name, {"text": TextLoss(1.0, 2)}, []) for name in ("base/smol", "pruned/other")])
    assert compared.of("elsewhere/smol") is None
    assert compared.of("base/smol").evaluations == compared.evaluations[:1]
    assert compared.of("elsewhere/other").evaluations == compared.evaluations
    assert "| perplexity, a\\|b |" in Comparison([Evaluation("p", {"a|b": TextLoss(1.0, 2)}, [])]).to_markdown()


def test_tables_show_names_as_they_are_and_to_their_ends():
    names = [f"models/of-some-length/smollm-135m-pruned-{number}0[en]" for number in range(8)]
    shown = render_table(["", *names], [["perplexity", *"12345678"]])
    assert shown.count("]") == 8 and "…" not in shown


def test_a_page_says_in_words_what_was_calibrated_on_and_checked():
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(sparsity=0.4), calibration="self", n_samples=4, seq_len=16)
    page = render_page(document_of([describe("pruned", pruner.report.record)]))
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))

    assert "calibrated on text that the model generated" in text
    assert "largest difference between the logits of the masked dense model and of the pruned model" in text
    assert "calibrated on self" not in text and "masked against sliced" not in text


def test_trainings_are_told_in_a_sentence(tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(method="random", sparsity=0.5, reconstruction="none"))
    assert "rained" not in report_table(document_of([describe("plain", pruner._record)]))
    earlier = [{"mode": "full", "steps": 3, "dataset": "first.txt"}]
    record = dataclasses.replace(
        pruner._record, recovery={"mode": "distill", "steps": 7, "dataset": "next.txt", "earlier": earlier}
    )
    sentence = (
        "Afterwards it was trained in all weights for 3 steps on first.txt; then in all weights for 7 steps on "
        "next.txt, towards the predictions of the dense model."
    )
    document = document_of([describe("trained", record)])
    assert sentence in report_table(document)
    write_page(document, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"<dt>training after pruning</dt><dd>{sentence}</dd>" in page and "'steps'" not in page
