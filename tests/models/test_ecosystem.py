"""A pruned model is a normal model to the libraries that people use next."""

import copy
import pickle

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from optimum_fwdprune import FwdPruner


@pytest.fixture
def pruned(tokens):
    config = tiny.request(sparsity=0.4, scope="global", attention_unit="kv_group")
    return FwdPruner(tiny.make_model("llama_gqa_biases")).prune(config, tokens)


def test_text_generation_pipeline(pruned, tokenizer):
    generate = pipeline("text-generation", model=pruned, tokenizer=tokenizer)
    output = generate("the quick brown", max_new_tokens=4, do_sample=False, pad_token_id=0)

    assert output[0]["generated_text"].startswith("the quick brown")


def test_trainer_trains_saves_resumes_and_reloads(pruned, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    before = pruned.lm_head.weight.detach().clone()
    Trainer(pruned, TrainingArguments(**arguments, max_steps=2), train_dataset=rows).train()
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")

    assert not torch.equal(pruned.lm_head.weight, before)
    assert torch.equal(checkpoint(tokens).logits, pruned.eval()(tokens).logits)
    resumed = Trainer(checkpoint, TrainingArguments(**arguments, max_steps=4), train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_lora_adapters_train_and_load_on_the_pruned_base(pruned, tokens, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    pruned.save_pretrained(tmp_path / "base")
    model = get_peft_model(pruned, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")

    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3)


def test_models_are_copied_and_pickled(pruned, tokens):
    expected = pruned(tokens).logits

    assert torch.equal(copy.deepcopy(pruned)(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(pruned))(tokens).logits, expected)
