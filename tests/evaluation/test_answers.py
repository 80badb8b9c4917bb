"""Perplexity of the answers in chats."""

import json
import logging

import datasets
import pandas
import pytest
import tiny
import torch

from optimum_fwdprune.data.chats import IGNORED, encoded_chat
from optimum_fwdprune.data.messages import Chat
from optimum_fwdprune.evaluation import chats_loss, compare, evaluate, texts_loss
from optimum_fwdprune.evaluation.chats import ChatRows, open_texts_or_chats


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHATS = [
    [
        {"role": "user", "content": "the quick brown fox"},
        {"role": "assistant", "content": "jumps over the lazy dog"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "over"},
    ],
    [{"role": "user", "content": "the lazy dog jumps over the quick fox"}, {"role": "assistant", "content": "quick"}],
    [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "the dog"}],
]
WITHOUT_ANSWER = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama_gqa_biases")


@pytest.fixture
def chatting(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def by_hand(model, tokenizer, chats, length=None):
    """The sum of negative log-likelihoods of the answers, and how many tokens they have."""
    nll, tokens = 0.0, 0
    for messages in chats:
        for ids, labels in encoded_chat(Chat(messages), tokenizer):
            logits = model(torch.tensor([ids[:length]])).logits[0].double().log_softmax(-1)
            for place, label in list(enumerate(labels[:length]))[1:]:
                if label != IGNORED:
                    nll -= float(logits[place - 1, label])
                    tokens += 1
    return nll, tokens


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_is_that_of_the_answers(batch_size, model, chatting):
    found = chats_loss(model, chatting, CHATS, batch_size=batch_size)
    with torch.no_grad():
        nll, tokens = by_hand(model, chatting, CHATS)

    assert (found.nll, found.tokens) == (pytest.approx(nll, rel=1e-5), tokens)
    answers = [message["content"] for chat in CHATS for message in chat if message["role"] == "assistant"]
    # The template ends an answer with a line break.
    assert tokens == sum(len(chatting(f"{answer}\n", add_special_tokens=False)["input_ids"]) for answer in answers)


def test_rows_may_have_every_form_that_recovery_reads(model, chatting):
    rows = [{"question": "fox", "answer": "the dog"}, {"question": "dog", "answer": "the quick fox"}]
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    assert chats_loss(model, chatting, rows) == chats_loss(model, chatting, [{"messages": chat} for chat in chats])
    assert chats_loss(model, chatting, rows) == chats_loss(model, chatting, chats)


def test_answers_in_a_prompt_do_not_count(model, chatting):
    row = {"prompt": CHATS[0][:3], "completion": CHATS[0][3:]}
    whole, last = chats_loss(model, chatting, CHATS[:1]), chats_loss(model, chatting, [row])

    assert 0 < last.tokens < whole.tokens


def test_long_chats_are_cut_and_chats_without_an_answer_left_out(model, chatting, caplog):
    caplog.set_level(logging.WARNING)
    length = len(encoded_chat(Chat(CHATS[0][:2]), chatting)[0][0]) - 2
    found = chats_loss(model, chatting, [*CHATS, WITHOUT_ANSWER], max_length=length)
    with torch.no_grad():
        nll, tokens = by_hand(model, chatting, CHATS, length)

    assert (found.nll, found.tokens) == (pytest.approx(nll, rel=1e-5), tokens)
    assert "1 of 4 rows of chats are left out" in caplog.text
    assert "of all answers are not measured. Raise max_length" in caplog.text


def test_what_cannot_be_measured_is_refused(model, chatting):
    longest = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"max_length={longest + 1} is more than the {longest} positions"):
        chats_loss(model, chatting, CHATS, max_length=longest + 1)
    with pytest.raises(ValueError, match="None of 1 rows of chats can be used"):
        chats_loss(model, chatting, [WITHOUT_ANSWER])
    with pytest.raises(ValueError, match="holds tokens, but text is needed"):
        evaluate(model, chatting, {"data": [{"input_ids": [1, 2, 3]}]})


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda rows: {"messages": [row["messages"] for row in rows]},
        datasets.Dataset.from_list,
        lambda rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
        pandas.DataFrame,
        iter,
    ],
    ids=["columns", "Dataset", "DatasetDict", "DataFrame", "iterator"],
)
def test_chats_in_every_form(wrapped, model, chatting):
    rows = [{"messages": chat} for chat in CHATS]
    expected = chats_loss(model, chatting, CHATS)

    assert evaluate(model, chatting, {"chats": wrapped(rows)}).texts["chats"] == expected
    assert chats_loss(model, chatting, wrapped(rows)) == expected


def test_a_table_of_texts_is_measured_as_texts_and_a_string_refused(model, chatting):
    rows = [{"text": "the quick brown fox"}, {"text": "the lazy dog"}]
    expected = texts_loss(model, chatting, [f"{row['text']}\n\n" for row in rows])

    assert evaluate(model, chatting, {"rows": datasets.Dataset.from_list(rows)}).texts["rows"] == expected
    with pytest.raises(ValueError, match="The text 'words' is a string"):
        evaluate(model, chatting, {"words": "the quick brown fox"})


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_length": 1}, {"max_length": -5}])
def test_numbers_out_of_range_are_refused(options, model, chatting):
    with pytest.raises(ValueError, match="max_length must be at least 2 and batch_size at least 1"):
        chats_loss(model, chatting, CHATS, **options)


def test_models_of_other_lengths_are_compared_on_the_same_tokens(chatting):
    models = {str(size): tiny.make_model("llama_mqa", max_position_embeddings=size) for size in (128, 24)}
    sizes = {"batch_sizes": (1,), "prompt_tokens": (4,), "new_tokens": 1, "repeats": 1}
    texts = {"text": ["the quick brown fox jumps over the lazy dog. " * 4], "chats": CHATS}
    found = compare(models, chatting, texts, **sizes).evaluations

    assert [each.texts["text"].tokens for each in found] == 2 * [
        texts_loss(models["24"], chatting, texts["text"]).tokens
    ]
    assert found[0].texts["chats"] == chats_loss(models["128"], chatting, CHATS, max_length=24)
    with pytest.raises(ValueError, match="max_length=25 is more than the 24 positions"):
        compare(models, chatting, texts, max_length=25, repeats=0)


def test_texts_and_chats_in_one_evaluation(model, chatting):
    text = ["the quick brown fox jumps over the lazy dog. " * 4]
    found = evaluate(model, chatting, {"text": text, "chats": CHATS}, max_length=48)

    assert found.texts["text"] == texts_loss(model, chatting, text, 48)
    assert found.texts["chats"] == chats_loss(model, chatting, CHATS, 48)


def test_every_model_of_a_comparison_reads_the_chats(model, chatting):
    other = tiny.make_model("llama_gqa_biases", seed=1)
    sizes = {"batch_sizes": (1,), "prompt_tokens": (4,), "new_tokens": 1, "repeats": 1}
    rows = ChatRows("file", [{"words": chat} for chat in CHATS], "words")
    found = compare({"a": model, "b": other}, chatting, {"chats": rows}, **sizes)

    assert [each.texts["chats"] for each in found.evaluations] == [
        chats_loss(each, chatting, CHATS) for each in (model, other)
    ]


def test_files_of_chats_and_of_texts_are_told_apart(tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in ("fox", "dog")))
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    name, chats = open_texts_or_chats(tmp_path / "chats.jsonl")

    assert name == "chats.jsonl" and [row["messages"] for row in chats.rows] == CHATS
    assert open_texts_or_chats(tmp_path / "rows.jsonl") == ("rows.jsonl", ["fox\n\n", "dog\n\n"])
    with pytest.raises(ValueError, match=r"tokens\.jsonl holds tokens, but text is needed"):
        open_texts_or_chats(tmp_path / "tokens.jsonl")
