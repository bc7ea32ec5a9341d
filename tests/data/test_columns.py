"""From columns to texts and conversations, and the words for what is wrong with them."""

from typing import Any

import pytest

from retort.data.chat import Conversation, Turn
from retort.data.columns import chat_columns, conversation_of, text_columns
from retort.data.faults import EMPTY, NO_ANSWER, NOT_TEXT, OTHER_ROLE, WRONG_TYPE, Fault
from retort.recipe import Chat, Text

ASKED = (Turn("user", "1+1?"), Turn("assistant", "2"))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("text", "text"),
        (" text\n", " text\n"),
        ("", EMPTY),
        (" \n", EMPTY),
        (None, EMPTY),
        (3, WRONG_TYPE),
        (["text"], WRONG_TYPE),
        ("\ud800", NOT_TEXT),
    ],
)
def test_texts(value: Any, wanted: str | Fault) -> None:
    columns, convert = text_columns(Text(kind="text", path="a.jsonl", column="body"))
    assert columns == ["body"]
    assert convert({"body": value, "text": "no"}) == wanted


def test_a_row_without_the_column_is_empty() -> None:
    _, convert = text_columns(Text(kind="text", path="a.jsonl"))
    assert convert({"body": "text"}) == EMPTY


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        ([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], ASKED),
        ([{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], ASKED),
        (
            [{"from": "system", "value": "s", "weight": 1}, {"from": "gpt", "value": "2"}],
            (Turn("system", "s"), Turn("assistant", "2")),
        ),
        ([{"role": "user", "content": "1+1?"}], NO_ANSWER),
        ([], EMPTY),
        (None, EMPTY),
        ("user: 1+1?", WRONG_TYPE),
        (["1+1?"], WRONG_TYPE),
        ([{"content": "1+1?"}], WRONG_TYPE),
        ([{"role": "assistant", "content": None}], EMPTY),
        ([{"role": "assistant", "content": [{"type": "text", "text": "2"}]}], WRONG_TYPE),
        ([{"role": "user", "content": "?"}, {"role": "tool", "content": "2"}], OTHER_ROLE),
    ],
)
def test_turns(turns: Any, wanted: Conversation | Fault) -> None:
    assert conversation_of(turns) == wanted
    columns, convert = chat_columns(Chat(kind="chat", path="a.jsonl", messages="turns"))
    assert columns == ["turns"]
    assert convert({"turns": turns}) == wanted


@pytest.mark.parametrize(
    ("question", "answer", "wanted"),
    [
        ("1+1?", "2", (Turn("user", "Q: 1+1?"), Turn("assistant", "2"))),
        ("", "2", EMPTY),
        ("1+1?", None, EMPTY),
        ("1+1?", 2, WRONG_TYPE),
    ],
)
def test_questions_and_answers(question: Any, answer: Any, wanted: Conversation | Fault) -> None:
    data = Chat(kind="chat", path="a.jsonl", question="q", answer="a", prompt="Q: {question}")
    columns, convert = chat_columns(data)
    assert columns == ["q", "a"]
    assert convert({"q": question, "a": answer}) == wanted
