"""Chats under templates of the families that models come with: which words count, and which rows cannot be used."""

import copy
import json

import numpy as np
import pandas
import pytest
import tiny

from optimum_fwdprune.data.chats import (
    IGNORED,
    chat_text,
    check_template,
    encoded_chat,
)
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.data.messages import Chat, UnusableRow, chat_of
from optimum_fwdprune.recovery import RecoveryOptions, training_data


# Qwen3's template keeps the thought only in the answers after the last question.
QWEN3 = """{%- set last = namespace(question=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}
        {%- set answer = m.content.split('</think>')[-1] %}
        {%- if loop.index0 > last.question %}
            {{- '<A>' + '<think>' + thought + '</think>' + answer + '</s>' }}
        {%- else %}
            {{- '<A>' + answer + '</s>' }}
        {%- endif %}
    {%- else %}
        {{- '<U>' + m.content + '</s>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<A>' }}{%- endif %}"""
# DeepSeek-R1-Distill's: what asks for an answer opens a thought, and a rendered answer has none.
R1 = """{{- bos_token }}{%- for m in messages %}
    {%- if m.role == 'assistant' %}{{- '<A>' + m.content.split('</think>')[-1] + eos_token }}
    {%- else %}{{- '<U>' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<A><think>' }}{%- endif %}"""
# Gemma's: no system role, and turns that alternate.
GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}
    {{- ('<A>' if m.role == 'assistant' else '<U>') + m.content.strip() + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<A>' }}{%- endif %}"""
# SmolLM3's: the template marks what the assistant writes.
MARKED = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}{{- '<A>' }}{% generation %}{{- m.content + '</s>' }}{% endgeneration %}
    {%- else %}{{- '<U>' + m.content + '</s>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<A>' }}{%- endif %}"""
# ChatML.
PLAIN = """{%- for m in messages %}
    {{- '<' + m.role + '>' + (m.content or m.tool_calls[0].function.name) + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""

QUICK = [
    {"role": "user", "content": "quick"},
    {"role": "assistant", "content": "<think>brown</think>fox"},
    {"role": "user", "content": "lazy"},
    {"role": "assistant", "content": "<think>dog</think>jumps"},
]


@pytest.fixture
def encode(tokenizer):
    """Text of every sequence of a chat under a template, and the part of it that counts."""

    def encode(template, row):
        speaking = copy.deepcopy(tokenizer)
        speaking.chat_template = template
        sequences = encoded_chat(chat_of(row if isinstance(row, dict) else {"messages": row}), speaking)
        counted = [[label for label in labels if label != IGNORED] for _, labels in sequences]
        return [
            (tokenizer.decode(ids).replace(" ", ""), tokenizer.decode(labels).replace(" ", ""))
            for (ids, _), labels in zip(sequences, counted)
        ]

    return encode


def test_a_template_that_drops_earlier_thoughts_has_every_answer_as_the_model_would_meet_it(encode):
    assert encode(QWEN3, QUICK) == [
        ("<U>quick</s><A><think>brown</think>fox</s>", "<think>brown</think>fox</s>"),
        ("<U>quick</s><A>fox</s><U>lazy</s><A><think>dog</think>jumps</s>", "<think>dog</think>jumps</s>"),
    ]


@pytest.mark.parametrize("answer", ["fox", "<fox", "<think>brown</think>fox", "Brown"])
def test_where_the_prompt_opens_a_thought_that_the_answer_lacks_the_whole_answer_counts(answer, encode):
    words = answer.split("</think>")[-1]
    ((text, counted),) = encode(R1, [QUICK[0], {"role": "assistant", "content": answer}, *QUICK[2:]])

    assert text == f"<s><U>quick<A>{words}</s><U>lazy<A>jumps</s>"
    assert counted == f"{words}</s>jumps</s>"


def test_a_template_that_only_appends_is_one_sequence(encode):
    chat = [{**message, "content": message["content"][-3:]} for message in QUICK]

    assert encode(GEMMA, chat) == [("<s><U>ick</s><A>fox</s><U>azy</s><A>mps</s>", "fox</s>mps</s>")]


def test_a_template_that_writes_everything_anew_still_has_its_answers_told_apart(encode):
    counting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd")]

    assert encode(counting, chat) == [("2ab", "b"), ("4abcd", "d")]


def test_a_template_that_marks_the_answers_is_believed(encode):
    chat = [{"role": "system", "content": "the"}, *QUICK]

    ((text, counted),) = encode(MARKED, chat)
    assert text == "<U>the</s><U>quick</s><A><think>brown</think>fox</s><U>lazy</s><A><think>dog</think>jumps</s>"
    assert counted == "<think>brown</think>fox</s><think>dog</think>jumps</s>"


def test_a_chat_that_begins_with_the_assistant_has_that_as_context(encode):
    greeting = {"from": "gpt", "value": "the"}
    asked = [{"from": "human", "value": "quick"}, {"from": "gpt", "value": "fox"}]

    assert encode(PLAIN, {"conversations": [greeting, *asked]}) == [
        ("<assistant>the</s><user>quick</s><assistant>fox</s>", "fox</s>")
    ]
    with pytest.raises(UnusableRow, match="chat template refuses it: Roles must alternate"):
        encode(GEMMA, {"conversations": [greeting, *asked]})
    with pytest.raises(UnusableRow, match="are part of the prompt, or follow no message of another role"):
        encode(PLAIN, {"conversations": [greeting]})


UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PARTED = MARKED.replace("m.content + '</s>' }}", "m.content }}{% endgeneration %}-{% generation %}{{- '</s>' }}", 1)


@pytest.mark.parametrize("template", [MARKED, PARTED, UNMARKED], ids=["marks", "marks in parts", "no marks"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUICK[:3], "completion": QUICK[3:]},
        {"messages": [QUICK[1], QUICK[2], QUICK[3]]},
        {"messages": [QUICK[0], {"role": "assistant", "content": ""}, *QUICK[2:]]},
    ],
    ids=["in the prompt", "unasked", "empty"],
)
def test_what_is_no_answer_does_not_count_whatever_the_template_marks(row, template, encode):
    ((_, counted),) = encode(template, row)

    assert counted.replace("-", "") == "<think>dog</think>jumps</s>"


PAIR = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "fox"}]
EARLIER = [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "over"}]
LAZY = [{"role": "system", "content": "lazy"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": json.dumps(PAIR)}, PAIR),
        ({"prompt": json.dumps(PAIR[:1]), "completion": json.dumps(PAIR[1:])}, PAIR),
        ({"messages": [{"role": "human", "content": "quick"}, {"role": "GPT", "content": "fox"}]}, PAIR),
        ({"messages": [{"from": "Human", "value": "quick"}, {"from": "model", "value": "fox"}]}, PAIR),
        ({"messages": PAIR, "system": "lazy"}, LAZY + PAIR),
        ({"messages": LAZY + PAIR, "system": "dog"}, LAZY + PAIR),
        ({"question": "quick", "answer": "fox", "system_prompt": "lazy"}, LAZY + PAIR),
        ({"prompt": PAIR[:1], "completion": PAIR[1:], "system": "lazy"}, LAZY + PAIR),
        ({"prompt": "quick", "completion": "fox", "system": "", "history": None}, PAIR),
        ({"instruction": "quick", "output": "fox", "history": [["quick", "fox"]]}, PAIR + PAIR),
        (
            {"instruction": "quick", "output": "fox", "history": '[["quick", "fox"]]', "system": "lazy"},
            LAZY + PAIR * 2,
        ),
        ({"instruction": "quick", "output": "fox", "history": PAIR}, PAIR + PAIR),
        ({"messages": LAZY + PAIR, "history": [["dog", "over"]]}, LAZY + EARLIER + PAIR),
        ({"messages": PAIR, "history": EARLIER, "system": "lazy"}, LAZY + EARLIER + PAIR),
        ({"messages": EARLIER + PAIR, "history": [["dog", "over"]]}, EARLIER + PAIR),
        ({"prompt": LAZY + PAIR[:1], "completion": PAIR[1:], "history": EARLIER}, LAZY + EARLIER + PAIR),
        ({"prompt": np.array(PAIR[:1]), "completion": np.array(PAIR[1:])}, PAIR),
        ({"instruction": "quick", "output": "fox", "history": pandas.Series([np.array(["quick", "fox"])])}, PAIR * 2),
    ],
)
def test_forms_of_datasets_become_the_same_messages(row, expected):
    assert chat_of(row).messages == expected


def test_answers_of_the_history_count(encode):
    row = {"instruction": "quick", "output": "fox", "history": [["lazy", "dog"]], "system": "over"}

    assert encode(PLAIN, row) == [
        (
            "<system>over</s><user>lazy</s><assistant>dog</s><user>quick</s><assistant>fox</s>",
            "dog</s>fox</s>",
        )
    ]


def test_of_a_prompt_of_messages_the_completion_counts(encode):
    row = {"prompt": QUICK[:3], "completion": QUICK[3:]}

    ((_, counted),) = encode(PLAIN, row)
    assert counted == "<think>dog</think>jumps</s>"


def test_contents_in_parts_are_joined_and_calls_of_tools_are_answers(encode):
    parts = [{"type": "text", "text": "qu"}, {"type": "text", "text": "ick", "image": None}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "fox"}}]}
    tool = {"role": "tool", "content": "lazy"}

    assert encode(PLAIN, [{"role": "user", "content": parts}, call, tool, QUICK[1]]) == [
        (
            "<user>quick</s><assistant>fox</s><tool>lazy</s><assistant><think>brown</think>fox</s>",
            "fox</s><think>brown</think>fox</s>",
        )
    ]


def test_tools_of_a_row_reach_the_template(tokenizer):
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}{{ messages[0].content }}"
    for tools in ([{"name": "fox"}], '[{"name": "fox"}]'):
        assert chat_text(chat_of({"messages": QUICK, "tools": tools}), speaking) == "foxquick"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "it has no messages"),
        ({"messages": "[{'role': 'user'}]"}, "messages is a str, not a list of messages"),
        ({"messages": QUICK, "system": 5}, "system is a int, not a text"),
        ({"prompt": "the", "completion": "fox", "history": [["a"]]}, "history is not a list of pairs"),
        ({"prompt": "the", "completion": "fox", "history": [["a", None]]}, "history is null, not a text"),
        ({"prompt": "the", "completion": "fox", "history": "a"}, "history is not JSON"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "the fox"}, "messages is a str, not a list of messages"),
        ({"messages": [None]}, "one in 'messages' has a NoneType"),
        ({"messages": ["the fox"]}, "one in 'messages' has a str"),
        ({"messages": [{"who": "me", "says": "x"}]}, "one in 'messages' has who, says"),
        ({"messages": [{"role": None, "content": "x"}]}, "a message in 'messages' has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "a message of user in 'messages' has no content"),
        ({"messages": [{"role": "user"}]}, "a message of user in 'messages' has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "content of a message of user in 'messages' is a int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of the type image"),
        ({"prompt": "the", "completion": None}, "completion is null, not a text"),
        ({"question": 5, "answer": "fox"}, "question is a int, not a text"),
        ({"instruction": "the", "input": 5, "output": "fox"}, "input is a int, not a text"),
        ({"messages": QUICK, "tools": "fox"}, "tools is not JSON"),
    ],
)
def test_rows_that_hold_no_chat_say_why(row, reason):
    with pytest.raises(UnusableRow, match=reason):
        chat_of(row)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (GEMMA, "refuses it: System role not supported"),
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
        ("{{ messages[0].content + 1 }}", "refuses it: can only concatenate str"),
        ("{{ nothing.there }}", "refuses it: 'nothing' is undefined"),
        ("{% for %}", "refuses it: Expected an expression"),
    ],
)
def test_a_template_that_refuses_a_chat_makes_its_row_unusable(template, reason, encode):
    with pytest.raises(UnusableRow, match=reason):
        encode(template, [{"role": "system", "content": "the"}, *QUICK])


def test_of_several_templates_the_default_is_taken(tokenizer, encode):
    assert encode({"default": PLAIN, "tool_use": R1}, QUICK) == encode(PLAIN, QUICK)
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = {"tool_use": PLAIN, "rag": PLAIN}
    with pytest.raises(ValueError, match="the chat templates rag, tool_use, and none of them is named default; set"):
        check_template(speaking)


def test_without_a_template_a_chat_is_paragraphs(tokenizer):
    assert chat_text(Chat(QUICK[:3]), tokenizer) == "quick\n\n<think>brown</think>fox</s>lazy\n\n"


@pytest.mark.parametrize(
    "read",
    [
        lambda rows, tokenizer: training_data(rows, tokenizer, RecoveryOptions(max_length=32)),
        lambda rows, tokenizer: load_calibration(
            tiny.request("wanda_sp", n_samples=2, seq_len=8), tiny.make_model("llama_mqa"), tokenizer, rows
        ),
    ],
    ids=["training", "calibration"],
)
@pytest.mark.parametrize("has_template", [True, False])
def test_a_tokenizer_without_a_template_is_warned_of(tokenizer, monkeypatch, read, has_template):
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = PLAIN if has_template else None
    said = []
    monkeypatch.setattr("optimum_fwdprune.data.chats.logger.warning", said.append)
    read([{"question": "the quick", "answer": "brown fox jumps over the lazy dog"}] * 40, speaking)
    assert [text.startswith("The tokenizer has no chat template") for text in said] == [True] * (not has_template)
