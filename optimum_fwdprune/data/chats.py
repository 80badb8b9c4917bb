"""Chats: the text and the tokens that a tokenizer's chat template makes of messages."""

from __future__ import annotations

import itertools
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from .messages import ASSISTANT, Chat, UnusableRow


# Labels that do not count in the loss.
IGNORED = -100

# A template that marks the assistant's words itself.
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        `list[tuple[list[int], list[int]]]`: tokens and labels, of which some count.

    Raises:
        UnusableRow: where the chat has no answer that counts, or the template refuses it.
    """
    if not _answers_of(chat):
        raise UnusableRow(_why_no_answer(chat))
    template = _template_of(tokenizer, chat.tools)
    if template is not None and MARKED.search(template) and tokenizer.is_fast:
        sequence = _marked_by_template(chat, tokenizer)
        if sequence is not None:
            return [sequence]
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


def _marked_by_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Tokens and labels by the template's marks; `None` where these leave open which of them count.

    A template marks whatever the assistant says, also in a prompt. Where some of it does not count, the marks must be
    one for every message of the assistant.
    """
    encoded: Any = _applied(
        chat.messages,
        chat,
        tokenizer,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, marks = encoded["input_ids"], encoded["assistant_masks"]
    spoken = [number for number, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
    answers = _answers_of(chat)
    if spoken == answers:
        return ids, [token if marked else IGNORED for token, marked in zip(ids, marks)]
    starts = [bool(marked) and not before for marked, before in zip(marks, [0, *marks])]
    if sum(starts) != len(spoken):
        return None
    messages = (spoken[max(count - 1, 0)] for count in itertools.accumulate(starts))
    return ids, [
        token if marked and message in answers else IGNORED for token, marked, message in zip(ids, marks, messages)
    ]


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
        and _says_something(message)
        and any(earlier["role"] != ASSISTANT for earlier in chat.messages[:number])
    ]


def _says_something(message: dict) -> bool:
    return bool(message.get("tool_calls") or str(message.get("content") or "").strip())


def _why_no_answer(chat: Chat) -> str:
    """The reason why no message of a chat is an answer that counts."""
    spoken = [message for message in chat.messages if message["role"] == ASSISTANT]
    if not spoken:
        roles = ", ".join(dict.fromkeys(message["role"] for message in chat.messages))
        return f"it has no message of the role {ASSISTANT}, only of {roles}"
    if not any(_says_something(message) for message in spoken):
        return "its answers are empty"
    return "what the assistant says in it is part of the prompt, or answers no message before it"


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
