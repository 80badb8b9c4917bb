"""`optimum-cli fwdprune recover | evaluate | benchmark | compare`, as a user runs them."""

import csv
import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import Comparison
from optimum_fwdprune.record.record import Record
from optimum_fwdprune.recovery import RecoveryOptions


def headings_of(card):
    return [line for line in card.text.splitlines() if line.startswith("## ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A dense checkpoint, the same pruned, and a text."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = tiny.make_model("llama_gqa_biases")
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    pruner = FwdPruner.from_pretrained(folder / "dense")
    tokens = torch.randint(0, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))
    pruner.prune(tiny.request(sparsity=0.4), tokens)
    pruner.save_pretrained(folder / "pruned")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return folder


TRAIN = ["--max_length", 16, "--max_steps", 6, "--per_device_train_batch_size", 4, "--set", "use_cpu=true"]


class TestRecover:
    @pytest.mark.parametrize("mode", ["lora", "full", "distill", "block_distill"])
    def test_a_recovered_checkpoint_is_a_plain_pruned_one(self, cli, folder, tmp_path, mode):
        output = tmp_path / "recovered"
        teacher = ["--teacher", folder / "dense"] if "distill" in mode else []
        command = ["recover", folder / "pruned", output, "--dataset", folder / "text.txt", "--mode", mode]
        code, out, err = cli(*command, *teacher, "--learning_rate", "1e-2", *TRAIN)

        assert code == 0, err
        assert f"Saved to {output}" in out
        before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (folder / "pruned", output))
        assert type(after) is type(before)
        assert not torch.equal(after.lm_head.weight, before.lm_head.weight) or mode != "full"
        assert any(not torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters()))
        assert (output / "fwdprune_plan.json").exists() and (output / "tokenizer.json").exists()
        assert {path.name for path in tmp_path.iterdir()} <= {"recovered", "recovered-training"}

    def test_the_teacher_is_what_was_pruned_unless_one_is_named(self, cli, folder, tmp_path, monkeypatch):
        """The plan names it, without the folders of the machine that it was pruned on."""
        monkeypatch.chdir(tmp_path)
        command = ["recover", folder / "pruned", tmp_path / "out", "--dataset", folder / "text.txt"]
        code, _, err = cli(*command, "--mode", "distill", *TRAIN)

        assert code == 0 and (tmp_path / "out" / "config.json").exists(), err

    def test_rounds_are_trained_by_one_command_which_the_card_repeats(self, cli, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(folder)
        command = ["prune", "-m", "dense", tmp_path / "out", "--calibration", "text.txt", "--seq_len", 16]
        command += ["--n_samples", 8, "--rounds", 2, "--sparsity", 0.4, "--resume", tmp_path / "states"]
        training = ["max_length=16", "max_steps=2", "lora_targets=q_proj,v_proj", "seed=3", "use_cpu=true"]
        code, _, err = cli(*command, "--recover", "text.txt:2", "text.txt", "--recovery", "mode=distill", *training)

        assert code == 0, err
        pruner = FwdPruner.from_pretrained(tmp_path / "out")
        assert pruner.recovery["dataset"] == "text.txt (67%), text.txt (33%)" and pruner.recovery["round"] == 2
        assert (
            "--recover text.txt:2 text.txt --recovery mode=distill max_steps=2 lora_targets=q_proj,v_proj "
            "max_length=16 seed=3\n"
        ) in (tmp_path / "out" / "README.md").read_text()

    def test_every_option_is_offered_with_its_help(self, cli):
        code, out, _ = cli("recover", "--help")

        assert code == 0 and "optimum-cli fwdprune recover pruned recovered" in " ".join(out.split())
        for field in dataclasses.fields(RecoveryOptions):
            assert f"--{field.name}" in out

    def test_a_stopped_run_goes_on(self, cli, folder, tmp_path):
        command = ["recover", folder / "pruned", tmp_path / "out", "--dataset", folder / "text.txt", *TRAIN[:2]]
        command += ["--output_dir", tmp_path / "steps", "--save_steps", 3, "--overwrite"]
        code, _, err = cli(*command, "--max_steps", 3, "--set", "use_cpu=true", "logging_steps=1")
        assert code == 0, err
        command += ["--resume_from_checkpoint", "true", "--gradient_checkpointing", "--max_steps", 6]
        code, _, err = cli(*command, "--set", "use_cpu=true", "logging_steps=1")

        assert code == 0, err
        arguments = torch.load(tmp_path / "steps" / "checkpoint-6" / "training_args.bin", weights_only=False)
        assert arguments.gradient_checkpointing
        state = json.loads((tmp_path / "steps" / "checkpoint-6" / "trainer_state.json").read_text())
        # What was logged before it stopped, and after.
        assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--mode", "lore"], "'lore' is not one of lora, full, distill, block_distill. Did you mean lora?"),
            (["--dataset", "wikitext2", "text.doc"], "--dataset 'text.doc' is no source of data in a mixture"),
            (["--lora_dropout", 2], "error: --lora_dropout must be in [0, 1]; got 2.0."),
            (["--dataset_column", "body"], "has no column 'body'; it has the columns text."),
            (["--max_length", 100000], "--max_length 100000 is more than the 128 positions"),
            (
                ["--set", "weight_decayy=1"],
                "TrainingArguments, which has no 'weight_decayy'. Did you mean weight_decay?",
            ),
            (
                ["--set", "foo=1"],
                "--set takes arguments of transformers.TrainingArguments, which has no 'foo'. (--debug",
            ),
            (["--set", "eval_strategy=steps"], "--set eval_strategy=steps needs data to evaluate on: set --held_out"),
            (
                ["--adapters", "--mode", "full"],
                "--adapters cannot be combined with --mode full, which trains",
            ),
            (["--mode", "distill", "--teacher", "nope"], "Cannot load the teacher nope: "),
            (
                ["--mode", "distill", "--teacher", "empty"],
                "the model that was pruned; --teacher names another one",
            ),
            (["--tokenizer", "nope"], "error: Cannot load the tokenizer nope: "),
            (["--report_to", "nowhere"], "nowhere"),
            (["--push-to-hub", "someone/model/too"], "'someone/model/too' is no valid name of a repository"),
            (["--set", "weight_decay"], "--set takes NAME=VALUE; got 'weight_decay'."),
            (["--resume_from_checkpoint", "true"], "There is no checkpoint to resume from"),
            (["--mode", "full", "--teacher", "dense"], "A teacher is used with --mode distill or"),
            (
                ["--learning_rate", "fast"],
                "error: argument --learning_rate/--learning-rate: invalid float value: 'fast'",
            ),
            (["--output_dir", "OUT/training"], "out/training lies in"),
            (
                ["--output_dir", "OUT"],
                "which must be empty until the trained model is saved to it; name a folder outside of it.",
            ),
        ],
    )
    def test_a_users_error_is_one_readable_line(self, cli, folder, tmp_path, arguments, message):
        command = ["recover", folder / "pruned", tmp_path / "out", "--dataset", folder / "text.txt"]
        arguments = [str(each).replace("OUT", str(tmp_path / "out")) for each in arguments]
        code, _, err = cli(*command, *TRAIN[2:4], *arguments)

        assert code in (1, 2) and message in " ".join(err.split()) and "Traceback" not in err
        assert not (tmp_path / "out").exists()

    def test_a_dataset_that_is_not_there(self, cli, folder, tmp_path):
        code, _, err = cli("recover", folder / "pruned", tmp_path / "out", "--dataset", "nowhere.txt")
        assert code == 1 and "There is no file nowhere.txt" in err


class TestMeasure:
    SPEED = ("--prompt_tokens", 16, "--new_tokens", 2, "--repeats", 1)

    def test_evaluate_prints_and_writes(self, cli, folder, tmp_path):
        table = tmp_path / "table.json"
        command = ["evaluate", folder / "pruned", "--text", folder / "text.txt", "--max_length", 32, "-o", table]
        code, out, err = cli(*command)

        assert code == 0, err
        assert "perplexity, text.txt" in out
        loss = json.loads(table.read_text())[0]["texts"]["text.txt"]
        assert loss["tokens"] > 300 and loss["nll"] > 0

    def test_files_of_one_name_are_two_texts(self, cli, folder, tmp_path):
        for language, words in (("en", "the quick brown fox "), ("de", "dog lazy the over ")):
            (tmp_path / language).mkdir()
            (tmp_path / language / "test.txt").write_text(words * 40)
        texts = [str(tmp_path / language / "test.txt") for language in ("en", "de")]
        command = ["evaluate", folder / "pruned", "--max_length", 32, "-o", tmp_path / "table.json", "--text"]
        code, _, err = cli(*command, *texts)
        assert code == 0, err
        assert list(json.loads((tmp_path / "table.json").read_text())[0]["texts"]) == texts
        code, _, err = cli(*command, texts[0], texts[0])
        assert code == 1 and f"--text names {texts[0]} twice." in " ".join(err.split())

    def test_evaluate_runs_a_folder_of_tasks(self, cli, folder, tmp_path):
        rows = [{"goal": "the quick", "sol1": " fox", "sol2": " dog", "label": 0}] * 3
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "task.yaml").write_text(
            f"task: foxes\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
            'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{goal}}"\ndoc_to_target: label\n'
            'doc_to_choice: "{{[sol1, sol2]}}"\n'
        )
        code, out, err = cli("evaluate", folder / "pruned", "--tasks", tmp_path)

        assert code == 0, err
        assert "foxes, acc" in out

    def test_benchmark_and_compare(self, cli, folder, tmp_path):
        models = (folder / "dense", folder / "pruned")
        code, out, err = cli("benchmark", *models, *self.SPEED, "-o", tmp_path / "speed.csv")
        assert code == 0, err
        (dense, pruned) = csv.DictReader((tmp_path / "speed.csv").open())
        assert int(pruned["parameters"]) < int(dense["parameters"]) and "prefill 1 x 16, times as fast" in out
        text = ["--text", folder / "text.txt", "--max_length", 32]
        code, out, err = cli("compare", *models, *text, *self.SPEED, "-o", tmp_path / "table.md")

        assert code == 0 and f"Written to {tmp_path / 'table.md'}." in out, err
        assert "## Measurements" not in (folder / "pruned" / "README.md").read_text()
        table = (tmp_path / "table.md").read_text()
        assert "| perplexity, text.txt |" in table and "| decode 1 x 16, times as fast | 1.00 |" in table

    def test_compare_writes_to_the_cards(self, cli, folder, tmp_path):
        dense, pruned = folder / "dense", shutil.copytree(folder / "pruned", tmp_path / "pruned")
        card = pruned / "README.md"
        card.write_text(card.read_text().replace("## Limits", "## My words\n\nKept.\n\n## Limits"))
        before, weights = ModelCard.load(card), (pruned / "model.safetensors").read_bytes()
        for words in (32, 16):
            options = ["--text", folder / "text.txt", "--max_length", words, "-o", tmp_path / "table.json"]
            code, out, err = cli("compare", dense, pruned, *options, *self.SPEED, "--cards")
            assert code == 0 and f"Written to {card}." in out, err
        after, measured = ModelCard.load(card), Comparison.load(tmp_path / "table.json")

        table = after.text.partition("<!-- measurements -->")[2].partition("<!-- end of measurements -->")[0]
        tokens = measured.evaluations[1].texts["text.txt"].tokens
        caption = f"\n\nPerplexity is that of {tokens:,} predicted tokens of text.txt."
        assert table.strip() == measured.without_folders().to_markdown().strip() + caption
        assert str(tmp_path) not in card.read_text()
        assert headings_of(after) == [*headings_of(before)[:2], "## Measurements", *headings_of(before)[2:]]
        assert "## My words\n\nKept.\n\n## Limits" in after.text
        (result,) = after.data.eval_results
        assert result.metric_value == measured.evaluations[1].texts["text.txt"].perplexity
        assert {**after.data.to_dict(), "model-index": None} == {**before.data.to_dict(), "model-index": None}
        kept, earlier = Record.of_checkpoint(pruned), Record.of_checkpoint(folder / "pruned")
        assert (kept.comparison, kept.outcome) == (measured.without_folders(), earlier.outcome)
        assert (pruned / "model.safetensors").read_bytes() == weights

    @pytest.mark.parametrize("content", [b"---\na: [1\n---\n# x\n", b"\xff\xfe"], ids=["yaml", "encoding"])
    def test_a_card_that_cannot_be_read_is_told_before_measuring(self, content, cli, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("optimum_fwdprune.commands.compare.compare_models", lambda *_: pytest.fail("measured"))
        pruned = shutil.copytree(folder / "pruned", tmp_path / "pruned")
        (pruned / "README.md").write_bytes(content)
        code, _, err = cli("compare", folder / "dense", pruned, "--text", folder / "text.txt", "--cards", "--json")

        assert code == 1 and f"The model card {pruned / 'README.md'} cannot be read" in err

    def test_a_folder_named_twice_is_refused(self, cli, folder):
        pruned = folder / "pruned"
        code, _, err = cli("compare", folder / "dense", pruned, f"{pruned}/", "--text", folder / "text.txt", "--cards")

        assert code == 1 and "A folder is named twice" in err

    def test_a_card_has_the_models_that_were_named_before_its_own(self, cli, folder, tmp_path):
        names = [shutil.copytree(folder / "pruned", tmp_path / name) for name in ("pruned", "recovered")]
        code, _, err = cli("compare", folder / "dense", *names, "--text", folder / "text.txt", *self.SPEED, "--cards")
        found = [[each.name for each in Record.of_checkpoint(name).comparison.evaluations] for name in names]

        assert code == 0 and found == [["dense", "pruned"], ["dense", "pruned", "recovered"]], err

    @pytest.mark.parametrize("checkpoint", ["dense", "org/model"])
    def test_no_card_to_write_to_is_told_before_measuring(self, checkpoint, cli, folder, monkeypatch):
        monkeypatch.setattr("optimum_fwdprune.commands.compare.compare_models", lambda *_: pytest.fail("measured"))
        monkeypatch.chdir(folder)
        code, _, err = cli("compare", "pruned", checkpoint, "--text", "text.txt", "--cards")

        assert code == 1 and f"{checkpoint} is no folder with a pruned checkpoint and its model card" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["evaluate", "PRUNED"], "There is nothing to measure: name --text, --tasks or both."),
            (["evaluate", "PRUNED", "--tasks", "hellaswagg"], "There is no task 'hellaswagg'; similar names are"),
            (["evaluate", "PRUNED", "--text", "nowhere.txt"], "There is no file nowhere.txt"),
            (["evaluate", "nowhere", "--text", "builtin"], "nowhere"),
            (["compare", "PRUNED", "PRUNED", "--text", "builtin"], "pruned twice. (--debug"),
            (["compare", "PRUNED", "PRUNED", "-o", "x.doc"], "x.doc must end in one of .md, .json, .csv"),
            (["benchmark", "PRUNED", "-o", "PRUNED/config.json/x.md"], "Cannot write beside"),
            (["benchmark", "PRUNED", "--repeats", "-1"], "--repeats must be at least 0"),
            (["benchmark", "PRUNED", "--prompt_tokens", "999"], "more than the 128 positions"),
        ],
    )
    def test_a_users_error_is_one_readable_line(self, cli, folder, arguments, message):
        code, _, err = cli(*(each.replace("PRUNED", str(folder / "pruned")) for each in arguments))
        lines = [line for line in err.splitlines() if line.startswith("error")]

        assert code == 1 and len(lines) == 1 and message in lines[0] and "Traceback" not in err


@pytest.mark.parametrize("command", ["prune", "recover", "evaluate", "compare", "export"])
def test_every_command_that_reads_a_tokenizer_takes_another_one(command, cli, folder, tmp_path):
    """Of a folder with a SentencePiece model alone, whose package is not installed."""
    sources = {}
    for name in ("dense", "pruned"):
        sources[name] = tmp_path / name
        shutil.copytree(folder / name, sources[name], ignore=shutil.ignore_patterns("tokenizer*"))
        (sources[name] / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    text, output = ["--text", folder / "text.txt"], tmp_path / "out"
    small = ["--calibration", folder / "text.txt", "--n_samples", 4, "--seq_len", 16]
    words = {
        "prune": ["prune", "-m", sources["dense"], output, *small],
        "recover": ["recover", sources["pruned"], output, "--dataset", folder / "text.txt", *TRAIN],
        "evaluate": ["evaluate", sources["pruned"], *text],
        "compare": ["compare", sources["dense"], sources["pruned"], *text, "--prompt_tokens", 8, "--repeats", 1],
        "export": ["export", sources["pruned"], tmp_path / "out.gguf"],
    }[command]
    code, _, err = cli(*words)

    assert code == 1 and "tokenizer.model, which is read with sentencepiece" in err and "--tokenizer" in err
    assert not output.exists()
    code, _, err = cli(*words, "--tokenizer", folder / "dense")
    assert code == 0, err
    if command in ("prune", "recover"):
        assert (output / "tokenizer.json").exists()
