"""The bridge to lm-evaluation-harness, offline, over tasks whose rows are made here."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, RecoveryArguments
from optimum_fwdprune.evaluation import TASK_PRESETS, evaluate_tasks


ROWS = [
    {"goal": "the quick brown fox", "sol1": " jumps over the lazy dog", "sol2": " dog lazy the over", "label": 0},
    {"goal": "the lazy dog", "sol1": " quick quick quick quick", "sol2": " jumps over the fox", "label": 1},
    {"goal": "a fox", "sol1": " and the brown dog", "sol2": " brown", "label": 0},
    {"goal": "over the dog", "sol1": " fox", "sol2": " the quick brown fox jumps", "label": 1},
    {"goal": "jumps", "sol1": " the", "sol2": " over the lazy brown dog", "label": 1},
]
# The paper's three families of tasks.
CHOICE = """
task: foxes_choice
output_type: multiple_choice
doc_to_text: "{{goal}}"
doc_to_target: label
target_delimiter: ""
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
CLASSIFICATION = """
task: foxes_classification
output_type: multiple_choice
doc_to_text: "Is it so? {{goal}}{{sol1}}:"
doc_to_target: label
target_delimiter: ""
doc_to_choice: [" yes", " no"]
metric_list:
  - metric: acc
"""
GENERATION = """
task: foxes_generation
output_type: generate_until
doc_to_text: "{{goal}}"
doc_to_target: "{{[sol1, sol2][label]}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 40, do_sample: false}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path):
    """Three tasks over one local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {folder / 'rows.jsonl'}}}}}\n"
    for name, task in (("choice", CHOICE), ("classification", CLASSIFICATION), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(data + "validation_split: validation\n" + task)
    return folder


@torch.no_grad()
def choices_by_hand(model, tokenizer):
    """The likelier ending of every row, token by token."""
    right = 0
    for row in ROWS:
        sums = []
        for ending in (row["sol1"], row["sol2"]):
            prompt = tokenizer(row["goal"])["input_ids"]
            ids = torch.tensor(tokenizer(row["goal"] + ending)["input_ids"])
            logits = model(ids[None]).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        right += sums.index(max(sums)) == row["label"]
    return right / len(ROWS)


def test_all_tasks_of_a_folder_are_run_on_a_pruned_model(folder, tokenizer, tokens):
    model = FwdPruner(tiny.make_model("llama_gqa_biases")).prune(tiny.request(sparsity=0.4), tokens)
    scores = {score.task: score for score in evaluate_tasks(model, tokenizer, [folder], batch_size=2)}

    assert scores.keys() == {"foxes_choice", "foxes_classification", "foxes_generation"}
    assert scores["foxes_choice"].value == pytest.approx(choices_by_hand(model, tokenizer))
    assert scores["foxes_choice"].rows == 5 and scores["foxes_choice"].standard_error > 0
    assert scores["foxes_generation"].metric == "exact_match" and 0 <= scores["foxes_generation"].value <= 1
    assert scores["foxes_classification"].value in {0, 0.2, 0.4, 0.6, 0.8, 1}


# What answers all three: the right ending of every row, and whether the first is it.
ANSWERS = [row["goal"] + (row["sol1"], row["sol2"])[row["label"]] + "\n" for row in ROWS]
ANSWERS += [f"Is it so? {row['goal']}{row['sol1']}:{(' yes', ' no')[row['label']]}\n" for row in ROWS]


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A model that knows the answers; untrained ones are right by chance."""
    model = tiny.make_model("llama_mha_tied")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        for text in ANSWERS:
            ids = torch.tensor(tokenizer(text)["input_ids"])[None]
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    return model.eval()


def test_a_model_that_knows_the_answers_scores_all_of_them(learned, folder, tokenizer):
    assert {score.value for score in evaluate_tasks(learned, tokenizer, [folder])} == {1}


def test_mini_llm_s_protocol(learned, folder, tokenizer, tmp_path):
    """Prune by gradients from forward passes, train LoRA adapters, and score all three families of tasks."""
    pruner = FwdPruner(copy.deepcopy(learned), tokenizer)
    request = {"method": "mini_llm", "draws": 8, "sparsity": 0.5, "n_samples": 4, "seq_len": 32}
    pruner.prune(tiny.request(**request), ANSWERS * 8)
    pruned = [score.value for score in evaluate_tasks(pruner.model, tokenizer, [folder])]
    args = RecoveryArguments(
        output_dir=str(tmp_path / "training"),
        max_steps=60,
        per_device_train_batch_size=len(ANSWERS),
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    pruner.recover({"input_ids": [tokenizer(text)["input_ids"] for text in ANSWERS] * 60}, args)
    pruner.save_pretrained(tmp_path / "recovered")
    recovered = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")

    assert min(pruned) < 1
    assert {score.value for score in evaluate_tasks(recovered, tokenizer, [folder])} == {1}


def test_the_process_and_the_model_are_left_as_they_were(folder, tokenizer):
    model = tiny.make_model("llama_mqa").train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate_tasks(model, tokenizer, [folder], limit=1)

    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2] and model.training


def test_a_limit_takes_fewer_rows(folder, tokenizer):
    (score, *_) = evaluate_tasks(tiny.make_model("bloom"), tokenizer, [folder], limit=2)

    assert score.rows == 2


def test_the_preset_and_the_harness_know_each_other():
    """Every name of the preset is a task of the installed harness; running them needs the Hub."""
    from lm_eval.tasks import TaskManager

    assert set(TASK_PRESETS["zero-shot"]) <= set(TaskManager().all_tasks)


def test_tasks_that_do_not_exist_are_named_with_the_nearest(tokenizer):
    with pytest.raises(ValueError, match=r"no task 'hellaswagg'; similar names are.*hellaswag"):
        evaluate_tasks(tiny.make_model("bloom"), tokenizer, ["hellaswagg"])


def test_tasks_whose_data_is_not_in_the_cache_are_refused_offline_with_a_way_out(tokenizer):
    with pytest.raises(OSError, match=r"the data of piqa is neither .* HF_HUB_OFFLINE is set.* leave these tasks out"):
        evaluate_tasks(tiny.make_model("bloom"), tokenizer, ["piqa"])


def test_a_folder_without_tasks_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no task"):
        evaluate_tasks(tiny.make_model("bloom"), tokenizer, [tmp_path])
    with pytest.raises(ValueError, match="No task was named"):
        evaluate_tasks(tiny.make_model("bloom"), tokenizer, [])


def test_piqas_sample(tokenizer, tmp_path):
    """The real rows, where they are at hand beside the project."""
    sample = Path(__file__).parents[3] / "shared" / "data" / "piqa-sample.jsonl"
    if not sample.exists():
        pytest.skip(f"{sample} is not here")
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {sample}}}}}\n"
    (tmp_path / "piqa.yaml").write_text(data + "validation_split: validation\n" + CHOICE)
    (score,) = evaluate_tasks(
        tiny.make_model("llama_mqa", max_position_embeddings=1024), tokenizer, [tmp_path], limit=8
    )

    assert score.rows == 8 and 0 <= score.value <= 1
