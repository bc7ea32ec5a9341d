"""Labels for steps by Monte Carlo: how often does an answer that goes on from here turn out right?

As Math-Shepherd has them (arXiv 2312.08935, section 3.3, soft estimation): the value of a step is
the share of continuations that reach the right answer. The prefix is read once and forked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from retort import console
from retort.grade import Grader
from retort.sample.engine import Engine, Finished, Request
from retort.sample.tokens import SamplingParams
from retort.score.reading import Reading
from retort.store import sample_seed

Prefix = tuple[str, tuple[int, ...]]
"""A problem, and the tokens of its prompt and of a completion's first steps."""


def prefixes(problem_id: str, reading: Reading) -> list[Prefix]:
    """What a completion says up to each of its positions."""
    return [(problem_id, tuple(reading.ids[: at + 1])) for at in reading.at]


def values(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    starts: Mapping[Prefix, int],
    golds: Mapping[str, str],
    params: SamplingParams,
) -> dict[Prefix, float]:
    """The share of `params.n` continuations of each prefix that are right. `starts` says where in
    it the completion begins, which is graded whole.
    """
    n = params.n
    wanted = list(starts)
    requests = [Request(list(prefix[1]), _seeds(prefix, n, params.seed)) for prefix in wanted]
    right = dict.fromkeys(wanted, 0)
    with console.progress("roll-outs", n * len(wanted)) as advance, Grader() as grader:
        for done in engine.stream(requests, params):
            prefix = wanted[done.request]
            text = _whole(tokenizer, prefix, starts[prefix], done)
            right[prefix] += grader.grade([(golds[prefix[0]], text)])[0].correct
            advance()
    return {prefix: count / n for prefix, count in right.items()}


def _seeds(prefix: Prefix, n: int, seed: int) -> Sequence[int]:
    name = f"{prefix[0]}/{','.join(map(str, prefix[1]))}"
    return [sample_seed(seed, name, i) for i in range(n)]


def _whole(tokenizer: PreTrainedTokenizerBase, prefix: Prefix, start: int, done: Finished) -> str:
    ids = [*prefix[1][start:], *done.completion.token_ids]
    return str(tokenizer.decode(ids, skip_special_tokens=True))
