"""From the columns of a row to a text or a conversation, or to what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from retort.data.chat import Conversation, Turn, ask
from retort.data.faults import EMPTY, NO_ANSWER, NOT_TEXT, OTHER_ROLE, WRONG_TYPE, Fault
from retort.data.rows import Content
from retort.recipe import Chat, Text

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Roles as they are written, and as chat templates know them; those of tools are not learnt."""

Convert = Callable[[dict[str, Any]], Content]


def text_columns(data: Text) -> tuple[Sequence[str], Convert]:
    """The column to read, and how a row of it becomes a text."""
    return [data.column], lambda values: text_of(values.get(data.column))


def chat_columns(data: Chat) -> tuple[Sequence[str], Convert]:
    """The columns to read, and how a row of them becomes a conversation."""
    if data.messages is not None:
        column = data.messages
        return [column], lambda values: conversation_of(values.get(column))
    assert data.question is not None and data.answer is not None
    question, answer = data.question, data.answer
    return [question, answer], lambda values: answered(
        data.prompt, values.get(question), values.get(answer)
    )


def answered(prompt: str, question: Any, answer: Any) -> Conversation | Fault:
    """A question in its prompt, and the answer to it."""
    asked, told = text_of(question), text_of(answer)
    if isinstance(asked, Fault):
        return asked
    if isinstance(told, Fault):
        return told
    return Turn("user", ask(prompt, asked)), Turn("assistant", told)


def conversation_of(turns: Any) -> Conversation | Fault:
    """A list of objects with a role and a content, or with from and value."""
    if turns is None:
        return EMPTY
    if not isinstance(turns, list):
        return WRONG_TYPE
    found = []
    for turn in turns:
        one = _turn(turn)
        if isinstance(one, Fault):
            return one
        found.append(one)
    if all(turn.role != "assistant" for turn in found):
        return NO_ANSWER if found else EMPTY
    return tuple(found)


def _turn(turn: Any) -> Turn | Fault:
    if not isinstance(turn, dict):
        return WRONG_TYPE
    role, content = (
        (turn.get("role"), turn.get("content"))
        if "role" in turn
        else (turn.get("from"), turn.get("value"))
    )
    if not isinstance(role, str):
        return WRONG_TYPE
    if role not in ROLES:
        return OTHER_ROLE
    text = text_of(content)
    return text if isinstance(text, Fault) else Turn(ROLES[role], text)


def text_of(value: Any) -> str | Fault:
    """A text that says something and can be written down."""
    if value is None:
        return EMPTY
    if not isinstance(value, str):
        return WRONG_TYPE
    if not value or value.isspace():
        return EMPTY
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return NOT_TEXT
    return value
