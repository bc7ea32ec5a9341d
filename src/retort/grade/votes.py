"""Which answers vote together: keys of one problem, grouped by the comparison that verdicts use."""

from collections import defaultdict
from collections.abc import Collection, Sequence

from retort.grade.answers import Form, plain_numeral
from retort.grade.pool import Pool, Request


def grouped(pool: Pool, problems: Sequence[Collection[str]]) -> list[dict[str, str]]:
    """For each problem's keys (as `vote_key` makes them) the group of each: the group's first key.

    Only keys with one fingerprint, the numbers in an answer, are compared: each with the first of
    them, what differs with the first of the rest, and so on. The order of keys does not matter.
    """
    groups = [{key: key for key in keys} for keys in problems]
    buckets = _buckets(pool, problems)
    while buckets:
        pairs = [(problem, keys[0], key) for problem, keys in buckets for key in keys[1:]]
        replies = pool.ask([Request("same", (_text(one), _text(key))) for _, one, key in pairs])
        rest: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
        for (problem, first, key), equal in zip(pairs, replies, strict=True):
            if equal:
                groups[problem][key] = first
            else:
                rest[problem, first].append(key)
        buckets = [(problem, keys) for (problem, _), keys in rest.items() if len(keys) > 1]
    for found in groups:
        found |= {key: found[plain] for key, plain in _without_base(found).items()}
    return groups


def _without_base(keys: Collection[str]) -> dict[str, str]:
    """52_8 -> 52, for numerals that are there without their base, and with no other one."""
    based: defaultdict[str, list[str]] = defaultdict(list)
    for key in keys:
        if (plain := plain_numeral(key)) is not None:
            based[plain].append(key)
    return {one[0]: plain for plain, one in based.items() if len(one) == 1 and plain in keys}


def _buckets(pool: Pool, problems: Sequence[Collection[str]]) -> list[tuple[int, list[str]]]:
    """(problem, keys that may be equal), the keys in order."""
    forms = {key: Form.of(key) for keys in problems for key in keys}
    # where all keys are numbers, or words, they are as different as they look
    open_problems = [i for i, keys in enumerate(problems) if _needs_algebra(forms, keys)]
    wanted = sorted({key for i in open_problems for key in problems[i] if forms[key].algebraic})
    replies = pool.ask([Request("fingerprint", (forms[key].text,)) for key in wanted])
    prints = dict(zip(wanted, replies, strict=True))
    buckets: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for i in open_problems:
        for key in sorted(problems[i]):
            if prints.get(key) is not None:
                buckets[i, prints[key]].append(key)
    return [(i, keys) for (i, _), keys in buckets.items() if len(keys) > 1]


def _needs_algebra(forms: dict[str, Form], keys: Collection[str]) -> bool:
    readable = [forms[key] for key in keys if forms[key].algebraic]
    return len(readable) > 1 and any(form.value is None for form in readable)


def _text(key: str) -> str:
    return Form.of(key).text
