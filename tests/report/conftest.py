"""Run folders with planted outcomes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from retort.store import Run

Outcomes = Mapping[str, Sequence[str | None]]  # answer of each sample by problem id, None for none
RIGHT = "42"  # the right answer to every planted problem
GRADER = "1"
SLOTS = 8


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Makes graded, timed runs whose completions give the planted answers."""

    def make(
        name: str,
        outcomes: Outcomes,
        tokens_per_second: float = 1000.0,
        tokens: int = 10,
        text: Callable[[str, int], str] = "{} {}".format,
        grader: str | None = GRADER,
    ) -> Run:
        samples = max(map(len, outcomes.values()))
        folder = tmp_path_factory.mktemp("run")  # not the name: that may be anything
        run = Run.start(folder, {"seed": 0}, manifest(name, samples))
        with run.lock():
            run.problems.append([problem(id) for id in outcomes])
            keys = [(id, i) for id, answers in outcomes.items() for i in range(len(answers))]
            run.completions.append([completion(*key, text(*key), tokens) for key in keys])
            run.timing.append([timing(tokens_per_second)])
            run.steps.append(steps(tokens_per_second))
            if grader is not None:
                rows = [verdict(id, i, outcomes[id][i]) for id, i in keys]
                run.verdicts(grader).append(rows)
        return run

    return make


def manifest(name: str, samples: int) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"folder": f"models/{name}", "fingerprint": "0", "parameters": 1_500_000},
        "n": samples,
        "recipe": {"sampling": {"n": samples}},
        "versions": {"retort": "0.1.0"},
        "device": "test device",
    }


def problem(id: str) -> dict[str, Any]:
    return {"problem_id": id, "question": f"What is {id}?", "answer": RIGHT}


def completion(id: str, i: int, text: str, tokens: int) -> dict[str, Any]:
    return {
        "problem_id": id,
        "sample_idx": i,
        "seed": i,
        "text": text,
        "token_count": tokens,
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "logprob": -1.0,
        "batch": 0,
        "started": 0.0,
        "ended": 1.0,
    }


def timing(tokens_per_second: float) -> dict[str, Any]:
    return {
        "slots": SLOTS,
        "look": 1,
        "share_from": None,
        "prefill_tokens": 100,
        "prefill_seconds": 100.0,  # must not count
        "decode_tokens": round(10 * tokens_per_second),
        "decode_steps": 100,
        "verifications": 0,
        "accepted": 0,
        "decode_seconds": 10.0,
        "starts": 0,
        "start_seconds": 0.0,
        "started": 0.0,
    }


def steps(tokens_per_second: float) -> list[dict[str, Any]]:
    """Steps of full slots at this speed, and of one row in a quarter of their time, whatever the
    rows see."""
    seconds = 100 * SLOTS / tokens_per_second
    return [
        {"rows": rows, "steps": 100, "context": 100 * rows * seen, "seconds": share * seconds}
        for rows, share in ((SLOTS, 1.0), (1, 0.25))
        for seen in (10, 40)
    ]


def verdict(id: str, i: int, answer: str | None) -> dict[str, Any]:
    return {
        "problem_id": id,
        "sample_idx": i,
        "answer": answer,
        "group": answer,
        "correct": answer == RIGHT,
        "method": "no answer" if answer is None else "exact",
    }
