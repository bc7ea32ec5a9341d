"""Why a row of data is of no use: the words under which rows that are skipped are counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row; the row is skipped, and counted under this reason."""

    reason: str


NOT_TEXT = Fault("not valid UTF-8")
NOT_JSON = Fault("not valid JSON")
NO_OBJECT = Fault("not a JSON object")
EMPTY = Fault("empty")
WRONG_TYPE = Fault("wrong type")
TOO_LONG = Fault("too long")
OTHER_ROLE = Fault("a role that is not system, user or assistant")
NO_ANSWER = Fault("no turn of the assistant")
REFUSED = Fault("refused by the chat template")
REWRITTEN = Fault("earlier turns rewritten by the chat template")
JOINED = Fault("a token reaches from a prompt into its answer")
REPEATED = Fault("repeats an evaluation problem")
