"""Messages: reading a row as a chat, in the forms that datasets have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


# Columns that hold the messages of a chat.
CHATS = ("messages", "conversation", "conversations")
# Columns of a question with those of its answer; `instruction` may have a further column `input`.
QUESTIONS = {"prompt": "completion", "instruction": "output", "question": "answer"}
# Columns of a system prompt.
SYSTEMS = ("system", "system_prompt")
# The role whose messages are answers.
ASSISTANT = "assistant"
# Names of roles in datasets and models, in lower case, with their names in templates.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), ASSISTANT),
    "system": "system",
}
# The beginning of a list of messages in a string.
LIST_OF_MESSAGES = re.compile(r"\s*\[\s*[{\]]")


class UnusableRow(ValueError):
    """A row cannot be used; the message is the reason, a clause without a full stop."""


@contextmanager
def refusing_all() -> Iterator[None]:
    """Turn `UnusableRow` into `ValueError`, for data that is refused as a whole."""
    try:
        yield
    except UnusableRow as error:
        raise ValueError(f"{error}.") from error


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`.

    Args:
        messages (`list[dict]`): at least one message.
        tools (`list`, *optional*): schemas of the functions that the assistant may call, for the template.
        asked (`int`, defaults to 0): number of messages at the beginning that form a prompt; answers in it do not
            count.
    """

    messages: list[dict]
    tools: list | None = None
    asked: int = 0


def chat_of(row: Mapping, column: str | None = None) -> Chat:
    """Return the chat of a row.

    Lists of messages may be strings that hold them as JSON. A system prompt in a column of its own begins the chat
    unless its messages include one. A row may have a `history`: pairs of earlier questions and their answers, or
    messages. It comes before the others, unless these begin with it.

    Raises:
        UnusableRow: where the row has no chat, or a message has no role or no text.
    """
    tools = _tools_of(row)
    for name in CHATS if column is None else (column,):
        if row.get(name) is not None:
            return Chat(_with_system(row, _after_history(row, _messages(row[name], name))), tools)
    for question, answer in QUESTIONS.items() if column is None else ():
        if question in row and answer in row:
            return _chat_of_question(row, question, answer, tools)
    raise UnusableRow(f"it has no messages; it has {', '.join(map(str, row)) or 'nothing'}")


def is_message(value: Any) -> bool:
    """Return whether a value is a mapping with a role and a content."""
    return (
        isinstance(value, Mapping)
        and bool(value.keys() & {"role", "from"})
        and bool(value.keys() & {"content", "value", "tool_calls"})
    )


def messages_in(text: str) -> list | None:
    """Return the messages that a string holds as JSON; `None` where it holds none."""
    if not LIST_OF_MESSAGES.match(text):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if all(map(is_message, values)) else None


def _tools_of(row: Mapping) -> list | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UnusableRow("tools is not JSON") from error
    if tools and not isinstance(tools, list):
        raise UnusableRow(f"tools is a {type(tools).__name__}, not a list")
    return tools or None


def _chat_of_question(row: Mapping, question: str, answer: str, tools: list | None) -> Chat:
    asked, answered = (_from_json(row[name]) for name in (question, answer))
    if _is_list(asked) and _is_list(answered):
        prompt = _with_system(row, _after_history(row, _messages(asked, question)))
        return Chat(prompt + _messages(answered, answer), tools, len(prompt))
    more = row.get("input") if question == "instruction" else None
    words = [_text_of(value, name) for value, name in ((asked, question), (more or "", "input"), (answered, answer))]
    pair = _pair("\n\n".join(filter(None, words[:2])), words[2])
    return Chat(_with_system(row, _history_of(row) + pair), tools)


def _with_system(row: Mapping, messages: list[dict]) -> list[dict]:
    """Return messages, preceded by a system prompt if the row has one in a column of its own."""
    if messages[0]["role"] == "system":
        return messages
    prompts = [_text_of(row[name], name) for name in SYSTEMS if row.get(name) is not None]
    return [{"role": "system", "content": prompt} for prompt in prompts[:1] if prompt.strip()] + messages


def _after_history(row: Mapping, messages: list[dict]) -> list[dict]:
    """Return messages, with the history of the row before them unless they include it, but after a system prompt."""
    history = _history_of(row)
    start = 1 if messages[0]["role"] == "system" else 0
    if messages[start : start + len(history)] == history:
        return messages
    return messages[:start] + history + messages[start:]


def _history_of(row: Mapping) -> list[dict]:
    """Return the earlier questions and answers of a row as messages."""
    history: Any = row.get("history")
    if isinstance(history, str) and history.strip():
        try:
            history = json.loads(history)
        except (ValueError, RecursionError) as error:
            raise UnusableRow("history is not JSON") from error
    history = _plain(history)
    if not history:
        return []
    if _is_list(history) and all(_is_list(pair) and len(pair) == 2 for pair in history):
        return [message for pair in history for message in _pair(*(_text_of(words, "history") for words in pair))]
    if _is_list(history) and all(map(is_message, history)):
        return _messages(history, "history")
    raise UnusableRow("history is not a list of pairs of a question and its answer")


def _pair(asked: str, answered: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": answered}]


def _text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow(f"{name} is {'null' if value is None else f'a {type(value).__name__}'}, not a text")
    return value


def _plain(value: Any) -> Any:
    """Return a value with arrays, which pandas and datasets may return, replaced by lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _from_json(value: Any) -> Any:
    """Return the messages that a value holds as JSON, or else the value with arrays replaced by lists."""
    value = _plain(value)
    messages = messages_in(value) if isinstance(value, str) else None
    return value if messages is None else messages


def _messages(values: Any, column: str) -> list[dict]:
    values = _from_json(values)
    if not _is_list(values):
        raise UnusableRow(f"{column} is a {type(values).__name__}, not a list of messages")
    if not values:
        raise UnusableRow(f"{column} is empty")
    return [_message(value, column) for value in values]


def _message(value: Any, column: str) -> dict:
    """Return a message with the keys `role` and `content` instead of ShareGPT's, and the role's name in templates."""
    if not isinstance(value, Mapping) or not value.keys() & {"role", "from"}:
        has = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise UnusableRow(f"a message must have role and content, or from and value; one in {column!r} has {has}")
    message = {name: content for name, content in value.items() if name not in ("from", "value")}
    role = value.get("role", value.get("from"))
    if not isinstance(role, str):
        raise UnusableRow(f"a message in {column!r} has no role")
    message["role"] = ROLES.get(role.strip().lower(), role)
    content = _plain(value.get("content", value.get("value")))
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
    """Return the text of a part of a message's content, which may have several parts."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UnusableRow(
        f"the content of a message in {column!r} has a part of the type {kind}, but only text is supported"
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
