"""Chats: what a row says as messages, and the tokens that a tokenizer's chat template makes of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


# Labels that do not count in the loss.
IGNORED = -100

# Columns that hold the messages of a chat.
CHATS = ("messages", "conversation", "conversations")
# ShareGPT's names of the roles.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
# What asks and what answers; an optional input stands between the two.
QUESTIONS = {"prompt": "completion", "instruction": "output", "question": "answer"}
# The role whose messages are answers.
ASSISTANT = "assistant"
# A template that marks the assistant's words itself.
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class UnusableRow(ValueError):
    """A row that cannot be used; the message is the reason, a clause without a full stop."""


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`.

    Args:
        messages (`list[dict]`): at least one.
        tools (`list`, *optional*): schemas of the functions that the assistant may call, for the template.
        asked (`int`, defaults to 0): messages at the beginning that are a prompt, whose answers do not count.
    """

    messages: list[dict]
    tools: list | None = None
    asked: int = 0


def chat_of(row: Mapping, column: str | None = None) -> Chat:
    """Return the chat of a row.

    Raises:
        UnusableRow: where it has none, or a message without a role or a text.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UnusableRow("tools is not JSON") from error
    if tools is not None and not isinstance(tools, list):
        raise UnusableRow(f"tools is a {type(tools).__name__}, not a list")
    for name in CHATS if column is None else (column,):
        if row.get(name) is not None:
            return Chat(_messages(row[name], name), tools or None)
    for question, answer in QUESTIONS.items() if column is None else ():
        if question not in row or answer not in row:
            continue
        asked, answered = row[question], row[answer]
        if _is_list(asked) and _is_list(answered):
            prompt = _messages(asked, question)
            return Chat(prompt + _messages(answered, answer), tools or None, len(prompt))
        more = row.get("input") if question == "instruction" else None
        for key, value in ((question, asked), (answer, answered), ("input", more or "")):
            if not isinstance(value, str):
                raise UnusableRow(f"{key} is {'null' if value is None else f'a {type(value).__name__}'}, not a text")
        messages = [{"role": "user", "content": "\n\n".join(filter(None, (asked, more)))}]
        return Chat([*messages, {"role": ASSISTANT, "content": answered}], tools or None, 1)
    raise UnusableRow("it has no messages")


def chat_text(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all of a chat as the tokenizer's template writes it; without a template, paragraphs.

    Raises:
        UnusableRow: where the template refuses the chat.
    """
    return _rendered(chat, len(chat.messages), tokenizer)


def encoded_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of a chat with labels that count the assistant's words alone.

    That is one sequence where the template only appends, message after message. A template that writes an answer
    differently once the chat goes on (such as one that keeps the thoughts of the last answer only) has every answer
    in a sequence of its own, as the model would meet it: what stands before it as the template writes it then.

    Returns:
        `list[tuple[list[int], list[int]]]`: tokens and labels; none where no answer counts.

    Raises:
        UnusableRow: where the template refuses the chat.
    """
    template = _template_of(tokenizer, chat.tools)
    if template is not None and MARKED.search(template) and tokenizer.is_fast:
        return _marked_by_template(chat, tokenizer)
    sequences = []
    for pieces in _answers_told_apart(chat, tokenizer):
        ids: list[int] = []
        labels: list[int] = []
        for text, counts in pieces:
            # A template writes its own first token. Piece by piece, as a prompt and what is generated after it.
            special = not ids and template is None
            new = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            if special and new[-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token)):
                # The tokenizer ends every text so, and this one goes on.
                new = new[:-1]
            ids += new
            labels += new if counts else [IGNORED] * len(new)
        sequences.append((ids, labels))
    return sequences


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where a tokenizer has several chat templates and none of them is the default."""
    _template_of(tokenizer)


def _marked_by_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    encoded: Any = _applied(
        chat.messages,
        chat,
        tokenizer,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, counted = encoded["input_ids"], encoded["assistant_masks"]
    return [(ids, [token if counts else IGNORED for token, counts in zip(ids, counted)])]


def _answers_told_apart(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, bool]]]:
    """Pieces of text, and whether each is an answer: a list of them for every sequence."""
    sequences: list[list[tuple[str, bool]]] = []
    before = ""
    for number in _answers_of(chat):
        text = _rendered(chat, number + 1, tokenizer)
        start = _start_of_answer(chat, number, text, tokenizer)
        if not sequences or not text.startswith(before) or start < len(before):
            sequences.append([])
            before = ""
        sequences[-1] += [(text[len(before) : start], False), (text[start:], True)]
        before = text
    return sequences


def _answers_of(chat: Chat) -> list[int]:
    """Numbers of the messages that are answers: of the assistant, not empty, and to something."""
    return [
        number
        for number, message in enumerate(chat.messages)
        if number >= max(1, chat.asked)
        and message["role"] == ASSISTANT
        and (message.get("tool_calls") or str(message.get("content") or "").strip())
        and any(earlier["role"] != ASSISTANT for earlier in chat.messages[:number])
    ]


def _start_of_answer(chat: Chat, number: int, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The place in a rendered chat where the model goes on after what asks for its answer."""
    prompt = _rendered(chat, number, tokenizer, asks=True)
    if text.startswith(prompt):
        return len(prompt)
    # What asks for an answer opens a thought, say, and this answer has none: it begins where the role ends. Two other
    # answers, unlike in their first character, tell where that is.
    others = []
    for content in ("A", "B"):
        messages = [*chat.messages[:number], {"role": ASSISTANT, "content": content}]
        others.append(_rendered(Chat(messages, chat.tools), number + 1, tokenizer))
    alike = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(text, *others))
    return sum(1 for _ in alike)


def _rendered(chat: Chat, count: int, tokenizer: PreTrainedTokenizerBase, asks: bool = False) -> str:
    """The first messages of a chat as text."""
    messages = chat.messages[:count]
    if tokenizer.chat_template is not None:
        return str(_applied(messages, chat, tokenizer, tokenize=False, add_generation_prompt=asks))
    # Without a template: paragraphs, and an end after every answer.
    ends = {ASSISTANT: tokenizer.eos_token or "\n\n"}
    return "".join((message.get("content") or "") + ends.get(message["role"], "\n\n") for message in messages)


def _applied(messages: list[dict], chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tools=chat.tools, **options)
    # A template is a program, which may fail in any of these ways where it does not foresee a chat.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UnusableRow(f"the tokenizer's chat template refuses it: {error}") from error


def _template_of(tokenizer: PreTrainedTokenizerBase, tools: list | None = None) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise ValueError(
            f"The tokenizer has the chat templates {', '.join(sorted(tokenizer.chat_template))}, and none is called "
            f"default; set tokenizer.chat_template to one of them."
        ) from error


def _messages(values: Any, column: str) -> list[dict]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not _is_list(values):
        raise UnusableRow(f"{column} is a {type(values).__name__}, not a list of messages")
    if not values:
        raise UnusableRow(f"{column} is empty")
    return [_message(value, column) for value in values]


def _message(value: Any, column: str) -> dict:
    """A message with `role` and `content`, which ShareGPT calls `from` and `value`."""
    if not isinstance(value, Mapping) or not value.keys() & {"role", "from"}:
        has = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise UnusableRow(f"a message has role and content, or from and value; one in {column!r} has {has}")
    message = {name: content for name, content in value.items() if name not in ("from", "value")}
    if "role" not in value:
        message["role"] = SPEAKERS.get(value["from"], value["from"])
    content = value.get("content", value.get("value"))
    if not isinstance(message["role"], str):
        raise UnusableRow(f"a message in {column!r} has no role")
    if _is_list(content):
        content = "".join(_text_of_part(part, column) for part in content)
    if content is None and not message.get("tool_calls"):
        raise UnusableRow(f"a message of {message['role']} in {column!r} has no content")
    if content is not None and not isinstance(content, str):
        raise UnusableRow(
            f"the content of a message of {message['role']} in {column!r} is a {type(content).__name__}, not a text"
        )
    return {**message, "content": content}


def _text_of_part(part: Any, column: str) -> str:
    """A part of a message's content, of which there may be several."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UnusableRow(f"the content of a message in {column!r} has a part of the type {kind}, and only text is used")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
