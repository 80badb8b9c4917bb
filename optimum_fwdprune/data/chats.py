"""Chats as text and as tokens, by a tokenizer's chat template."""

from __future__ import annotations

import itertools
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..runs.loggers import get_logger
from .messages import ASSISTANT, Chat, UnusableRow


logger = get_logger(__name__)

# Labels that do not count in the loss.
IGNORED = -100

# A template with this statement marks the assistant's tokens itself.
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_text(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat as text by the tokenizer's template; without a template, messages are paragraphs.

    Raises:
        UnusableRow: where the template refuses the chat.
    """
    return _rendered(chat, len(chat.messages), tokenizer)


def encoded_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of a chat, with labels of which only those of the assistant's tokens count.

    The result is one sequence if the template only appends text for every message. Some templates write an answer
    differently once another message follows it, for example because they keep the thoughts of the last answer only.
    Then every answer is in a sequence of its own, after the messages before it as the template writes them at that
    point, which is what the model would be given.

    Returns:
        `list[tuple[list[int], list[int]]]`: tokens and labels of every sequence, in which at least one label counts.

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
            # A template writes the first special token itself. Pieces are tokenized separately, as generation does.
            special = not ids and template is None
            new = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            if special and new[-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token)):
                # The tokenizer appends EOS to every text, but this text continues.
                new = new[:-1]
            ids += new
            labels += new if counts else [IGNORED] * len(new)
        sequences.append((ids, labels))
    return sequences


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where a tokenizer has several chat templates and none of them is the default, and warn where
    it has none."""
    if _template_of(tokenizer) is None:
        logger.warning(
            "The tokenizer has no chat template, so that the messages of a chat are joined as paragraphs, without "
            "their roles. If the model will be asked through a template, set tokenizer.chat_template, or name a "
            "tokenizer that has it."
        )


def _marked_by_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Return tokens and labels by the template's marks; `None` where the marks do not determine which labels count.

    A template marks all messages of the assistant, also those in a prompt, which do not count. In such a chat there
    must be exactly one mark per message of the assistant.
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
    """Return for every sequence a list of pieces of text, and whether a piece is an answer."""
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
    """Return the numbers of the messages that count: answers of the assistant that are not empty, after a question."""
    return [
        number
        for number, message in enumerate(chat.messages)
        if number >= max(1, chat.asked)
        and message["role"] == ASSISTANT
        and _has_content(message)
        and any(earlier["role"] != ASSISTANT for earlier in chat.messages[:number])
    ]


def _has_content(message: dict) -> bool:
    return bool(message.get("tool_calls") or str(message.get("content") or "").strip())


def _why_no_answer(chat: Chat) -> str:
    """Return the reason why no message of a chat is an answer that counts."""
    spoken = [message for message in chat.messages if message["role"] == ASSISTANT]
    if not spoken:
        roles = ", ".join(dict.fromkeys(message["role"] for message in chat.messages))
        return f"it has no message of the role {ASSISTANT}, only of {roles}"
    if not any(_has_content(message) for message in spoken):
        return "its answers are empty"
    return "its messages of the assistant are part of the prompt, or follow no message of another role"


def _start_of_answer(chat: Chat, number: int, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the place in a rendered chat at which an answer starts, after the generation prompt."""
    prompt = _rendered(chat, number, tokenizer, asks=True)
    if text.startswith(prompt):
        return len(prompt)
    # The generation prompt may for example open a thought, which this answer does not have. The answer then starts
    # after the role, at the first character that differs from two other answers whose first characters are different.
    others = []
    for content in ("A", "B"):
        messages = [*chat.messages[:number], {"role": ASSISTANT, "content": content}]
        others.append(_rendered(Chat(messages, chat.tools), number + 1, tokenizer))
    alike = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(text, *others))
    return sum(1 for _ in alike)


def _rendered(chat: Chat, count: int, tokenizer: PreTrainedTokenizerBase, asks: bool = False) -> str:
    """Return the first `count` messages of a chat as text."""
    messages = chat.messages[:count]
    if tokenizer.chat_template is not None:
        return str(_applied(messages, chat, tokenizer, tokenize=False, add_generation_prompt=asks))
    # Without a template, messages are paragraphs, and EOS follows every answer.
    ends = {ASSISTANT: tokenizer.eos_token or "\n\n"}
    return "".join((message.get("content") or "") + ends.get(message["role"], "\n\n") for message in messages)


def _applied(messages: list[dict], chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tools=chat.tools, **options)
    # A template is a program, which may raise any of these errors for a chat that it does not support.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UnusableRow(f"the tokenizer's chat template refuses it: {error}") from error


def _template_of(tokenizer: PreTrainedTokenizerBase, tools: list | None = None) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise ValueError(
            f"The tokenizer has the chat templates {', '.join(sorted(tokenizer.chat_template))}, and none of them is "
            f"named default; set tokenizer.chat_template to one of them."
        ) from error
