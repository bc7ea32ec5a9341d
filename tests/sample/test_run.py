"""Sampling into a run folder: nothing twice, nothing lost, nothing of another run mixed in."""

import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import retort
from retort.data.chat import ask, load_tokenizer, prompt_ids
from retort.data.problems import load as load_problems
from retort.grade import GRADER_VERSION, ballots
from retort.grade import run as grading
from retort.grade.run import grade
from retort.model.cost import decode_bytes, decode_flops
from retort.recipe import SampleRecipe, load
from retort.sample import memory
from retort.sample import run as runs
from retort.sample.clock import Timing
from retort.sample.cpu_prompts import WORTHWHILE
from retort.sample.engine import Engine, Finished, Request
from retort.sample.run import sample
from retort.sample.speculative import Speculative
from retort.sample.tokens import SamplingParams
from retort.sample.work import Portion
from retort.store import Run, sample_seed

Row = dict[str, Any]


def recipe(settings: Sequence[str], *changes: str) -> SampleRecipe:
    return load(SampleRecipe, [*settings, *changes])


def rows(folder: Path) -> dict[tuple[str, int], Row]:
    """Completions by key; each key once."""
    table = Run.open(folder).completions.read().to_pylist()
    by_key = {(row["problem_id"], row["sample_idx"]): row for row in table}
    assert len(by_key) == len(table)
    return by_key


def said(folder: Path) -> dict[tuple[str, int], tuple[str, int, str]]:
    """What was sampled, without when and with what."""
    return {
        key: (row["text"], row["token_count"], row["finish_reason"])
        for key, row in rows(folder).items()
    }


def parts(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every table file; run.json and .lock are written by each command."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("part-*")
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(message: str, recipe: SampleRecipe) -> None:
    """Sampling is refused for this reason, and leaves the folder as it was."""
    before = content(recipe.out)
    with pytest.raises(ValueError, match=message):
        sample(recipe)
    after = content(recipe.out)
    lock = str(recipe.out / ".lock")  # names the last process that looked
    assert {**before, lock: b""} == {**after, lock: b""}


# What a run holds


def test_rows_are_what_the_engine_samples(settings: list[str]) -> None:
    asked = recipe(settings, "sampling.temperature=0.9", "sampling.top_p=0.9", "sampling.seed=3")
    folder = sample(asked)
    assert folder == asked.out
    found, problems = rows(folder), load_problems(asked.problems)
    assert found.keys() == {(problem.id, j) for problem in problems for j in range(3)}
    # The same by hand: the recipe's prompt, the keys' seeds, the checkpoint's weights and tokens.
    tokenizer = load_tokenizer(asked.model)
    prompts = [prompt_ids(tokenizer, ask(asked.prompt, problem.question)) for problem in problems]
    requests = [
        Request(prompt, [sample_seed(3, problem.id, j) for j in range(3)])
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    params = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.9)
    for done in Engine(retort.load(asked.model), slots=1).stream(requests, params):
        row = found[problems[done.request].id, done.sample]
        completion = done.completion
        assert row["text"] == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert row["token_count"] == len(completion.token_ids)
        assert row["finish_reason"] == completion.finish_reason
        assert row["prompt_tokens"] == len(prompts[done.request])
        assert row["seed"] == requests[done.request].seeds[done.sample]
        assert row["logprob"] == pytest.approx(completion.logprob, abs=1e-4)
        assert row["started"] <= row["ended"]
    assert {row["finish_reason"] for row in found.values()} == {"stop", "length"}


def test_special_tokens_are_no_text(settings: list[str], make_model: Callable[..., Path]) -> None:
    # The tokenizer's first four tokens are its markers, such as <|end|>.
    model = make_model("marked", eos_token_ids=(0, 1, 2, 3))
    found = rows(sample(recipe(settings, f"model={model}", "sampling.n=40"))).values()
    stopped = [row["text"] for row in found if row["finish_reason"] == "stop"]
    assert stopped
    assert not any("<|" in text for text in stopped)


def test_shots_come_before_each_question_and_are_part_of_what_a_run_is(
    settings: list[str],
) -> None:
    before = {row["prompt_tokens"] for row in rows(sample(recipe(settings))).values()}
    shots = ["shots.kind=arithmetic", "shots.split=train", "shots.count=2"]
    refused("shots.kind was absent, is now", recipe(settings, *shots))
    shown = rows(sample(recipe(settings, *shots, f"out={recipe(settings).out}-shots"))).values()
    assert min(row["prompt_tokens"] for row in shown) > 2 * max(before)


def test_text_ends_where_a_stop_string_begins(settings: list[str]) -> None:
    free = rows(sample(recipe(settings, "sampling.n=20")))
    letter = next(text[3] for text in (row["text"] for row in free.values()) if len(text) > 6)
    stop = f'sampling.stop=["{letter}"]'
    cut = rows(sample(recipe(settings, "sampling.n=20", stop, "force=true")))
    assert any(cut[key]["text"] != row["text"] for key, row in free.items())
    for key, row in free.items():
        assert cut[key]["text"] == row["text"].split(letter)[0]
        if letter in row["text"]:
            assert cut[key]["finish_reason"] == "stop"


def test_another_stop_string_is_another_run(settings: list[str]) -> None:
    sample(recipe(settings))
    refused("another run", recipe(settings, 'sampling.stop=["x"]'))


def test_slots_fill_the_memory(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 0.0)
    run = Run.open(sample(recipe(settings, "slots=auto")))
    assert {row["slots"] for row in run.timing.read().to_pylist()} == {1}


def test_problems_are_kept_with_their_answers(settings: list[str]) -> None:
    asked = recipe(settings)
    kept = Run.open(sample(asked)).problems.read().to_pylist()
    assert kept == [
        {"problem_id": each.id, "question": each.question, "answer": each.answer}
        for each in load_problems(asked.problems)
    ]


def test_manifest_tells_what_the_run_is(settings: list[str]) -> None:
    asked = recipe(settings)
    manifest = Run.open(sample(asked)).manifest
    assert SampleRecipe(**manifest["recipe"]) == asked
    assert manifest["name"] == "tiny"
    assert manifest["n"] == 3
    assert manifest["model"]["parameters"] == retort.load(manifest["model"]["folder"]).size
    assert manifest["versions"]["retort"] == retort.__version__
    assert manifest["identity"]["dtype"] == "float32"
    config, token = retort.load(manifest["model"]["folder"]).config, manifest["model"]["token"]
    flops = token["flops"] + 7 * token["flops_per_context"]
    assert flops == decode_flops(config, 7).total
    moved = token["weight_bytes"] + 3 * (token["row_bytes"] + 7 * token["bytes_per_context"])
    assert moved == decode_bytes(config, batch=3, context=7, dtype_bytes=4).total
    named = Run.open(sample(recipe(settings, "name=student"))).manifest
    assert named["name"] == "student"


def test_timing_adds_up(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FLUSH_ROWS", 4)
    run = Run.open(sample(recipe(settings)))
    table, found = run.timing.read().to_pylist(), rows(run.folder).values()
    assert len(table) == len(run.completions.part_files()) == 2
    assert sum(row["decode_tokens"] for row in table) == sum(row["token_count"] for row in found)
    prompts = {row["problem_id"]: row["prompt_tokens"] for row in found}
    assert sum(row["prefill_tokens"] for row in table) == sum(prompts.values())
    assert all(row["slots"] == 5 for row in table)
    # Seconds of the engine are part of the seconds that passed.
    passed = max(row["ended"] for row in found) - min(row["started"] for row in found)
    assert 0 < sum(row["decode_seconds"] for row in table) <= passed + 0.1
    assert sum(row["prefill_seconds"] for row in table) > 0
    assert [row["batch"] for row in found] == sorted(row["batch"] for row in found)
    assert {row["batch"] for row in found} == {0, 1}
    steps = run.steps.read().to_pylist()
    assert {row["rows"] for row in steps} <= {1, 2, 3, 4, 5}
    # the first step loads kernels, and is left out
    logged = sum(row["steps"] for row in steps)
    assert logged == sum(row["decode_steps"] for row in table) - 1
    assert 0 < sum(row["seconds"] for row in steps) < sum(row["decode_seconds"] for row in table)
    assert {row["look"] for row in table} == {1}
    assert {row["share_from"] for row in table} == {WORTHWHILE}


@pytest.mark.parametrize("flush", [1, 2, 100])
def test_completions_of_one_token(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, flush: int
) -> None:
    monkeypatch.setattr(runs, "FLUSH_ROWS", flush)
    folder = sample(recipe(settings, "sampling.max_tokens=1", "slots=64"))
    assert len(rows(folder)) == 12
    timing = Run.open(folder).timing.read().to_pylist()
    assert sum(row["decode_tokens"] for row in timing) == 12


def test_slow_sampling_is_written_by_the_clock(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
    folder = sample(recipe(settings, "slots=1"))
    assert len(Run.open(folder).completions.part_files()) == 12


def test_what_waits_is_written_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the next completion takes for ever."""
    clock = 0.0
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock))
    portion = Portion(0, 1, 1, None, [], Timing(), {})

    def arrivals() -> Iterator[Portion | None]:
        nonlocal clock
        for now, arrived in [(1.0, portion), (10.0, None), (22.0, None), (90.0, None)]:
            clock = now
            yield arrived
        clock = 600.0
        yield portion

    written = [(clock, len(some)) for some in runs._flushes(arrivals())]
    assert written == [(22.0, 1), (600.0, 1)]


def test_ctrl_c_while_completions_are_written_waits_for_them(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = runs._write

    def interrupted(run: Run, *others: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(run, *others)

    monkeypatch.setattr(runs, "FLUSH_ROWS", 5)
    monkeypatch.setattr(runs, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(recipe(settings))
    folder = recipe(settings).out
    assert len(Run.open(folder).completions.part_files()) == 1
    assert len(rows(folder)) >= 5
    assert Run.open(folder).timing.rows() == 1


# Going on


def test_the_second_time_nothing_is_done(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(settings)
    before, manifest = parts(sample(asked)), Run.open(asked.out).manifest
    monkeypatch.delattr(Engine, "looks")  # nothing is sampled
    assert parts(sample(asked)) == before
    assert Run.open(asked.out).manifest == manifest


def test_nothing_derived_makes_it_sample_again(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graded, graded by another version, and scored by two models."""
    asked = recipe(settings)
    before = parts(sample(asked))
    run = Run.open(asked.out)
    grade(run.folder)
    for module in (grading, ballots):
        monkeypatch.setattr(module, "GRADER_VERSION", "another", raising=False)
    grade(run.folder)
    keys = run.completions.read(["problem_id", "sample_idx"]).to_pylist()
    with run.lock():
        for name in ("one", "two"):
            run.scores(name).append([key | {"scores": [0.5]} for key in keys])
    monkeypatch.delattr(Engine, "looks")  # nothing is sampled
    sample(asked)
    assert run.verdict_versions() == [GRADER_VERSION, "another"]
    assert run.score_names() == ["one", "two"]
    assert {run.verdicts(version).rows() for version in run.verdict_versions()} == {12}
    assert before.items() <= parts(asked.out).items()


def test_larger_n_adds_what_is_missing(settings: list[str]) -> None:
    old = parts(sample(recipe(settings)))
    old_rows = rows(recipe(settings).out)
    folder = sample(recipe(settings, "sampling.n=5"))
    assert len(rows(folder)) == 4 * 5
    assert {key: row for key, row in rows(folder).items() if key[1] < 3} == old_rows
    assert old.items() <= parts(folder).items()
    assert said(folder) == said(sample(recipe(settings, "sampling.n=5", f"out={folder}-new")))


def test_smaller_n_takes_nothing_away(settings: list[str]) -> None:
    before = parts(sample(recipe(settings)))
    folder = sample(recipe(settings, "sampling.n=2"))
    assert parts(folder) == before
    assert Run.open(folder).manifest["n"] == 2


def test_more_problems_extend(settings: list[str]) -> None:
    old = parts(sample(recipe(settings)))
    folder = sample(recipe(settings, "problems.count=6"))
    assert len(rows(folder)) == 6 * 3
    assert Run.open(folder).problems.read().num_rows == 6
    assert old.items() <= parts(folder).items()
    both = sample(recipe(settings, "problems.count=6", f"out={folder}-new"))
    assert said(folder) == said(both)


def test_slots_may_change_on_the_way(settings: list[str]) -> None:
    folder = sample(recipe(settings, "sampling.n=1", "slots=1"))
    sample(recipe(settings, "slots=64"))
    assert said(folder) == said(sample(recipe(settings, f"out={folder}-new")))


def test_rows_that_are_lost_are_made_again(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FLUSH_ROWS", 5)
    folder = sample(recipe(settings))
    expected = said(folder)
    Run.open(folder).completions.part_files()[1].unlink()
    assert 5 <= len(rows(folder)) < 12
    sample(recipe(settings))
    assert said(folder) == expected


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_what_is_finished(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    looks = Engine.looks

    def interrupted(self: Engine, *asked: Any) -> Iterator[list[Finished]]:
        for number, done in enumerate(chain.from_iterable(looks(self, *asked))):
            if number == 7:
                raise end
            yield [done]

    with monkeypatch.context() as patch:
        patch.setattr(runs, "FLUSH_ROWS", 5)
        patch.setattr(Engine, "looks", interrupted)
        with pytest.raises(end):
            sample(recipe(settings))
    asked = recipe(settings)
    before = parts(asked.out)
    assert len(rows(asked.out)) == 7
    sample(asked)
    assert before.items() <= parts(asked.out).items()
    assert said(asked.out) == said(sample(recipe(settings, f"out={asked.out}-new")))


@pytest.mark.parametrize("table", ["problems", "completions", "timing", "steps"])
def test_what_a_damaged_part_held_is_made_again(
    settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    table: str,
) -> None:
    monkeypatch.setattr(runs, "FLUSH_ROWS", 5)
    folder = sample(recipe(settings))
    expected, before = said(folder), parts(folder)
    torn = sorted((folder / table).glob("part-*"))[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    capfd.readouterr()
    sample(recipe(settings))
    aside = torn.with_suffix(".damaged")
    assert f"warning: {aside}: a damaged part, set aside" in capfd.readouterr().err
    assert said(folder) == expected
    kept = {path: content for path, content in before.items() if path != f"{table}/{torn.name}"}
    assert kept.items() <= parts(folder).items()
    assert Run.open(folder).problems.rows() == 4
    assert aside.is_file()


def test_force_starts_over(settings: list[str]) -> None:
    folder = sample(recipe(settings))
    first = said(folder)
    sample(recipe(settings, "sampling.seed=1", "force=true"))
    assert said(folder).keys() == first.keys()
    assert said(folder) != first
    assert "force" not in Run.open(folder).manifest["recipe"]
    sample(recipe(settings, "sampling.seed=1"))  # which is now what the folder holds


# Refusals


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("sampling.temperature=0.7", "sampling.temperature was 0.8, is now 0.7"),
        ("sampling.max_tokens=11", "sampling.max_tokens was 10, is now 11"),
        ("sampling.seed=1", "sampling.seed was 0, is now 1"),
        ("prompt='A: {question}'", 'prompt was "Q: {question}", is now "A: {question}"'),
        ("problems.seed=1", "problems.seed was 0, is now 1"),
        ("dtype=bfloat16", 'dtype was "float32", is now "bfloat16"'),
        ("cache.kv_dtype=bfloat16", 'cache.kv_dtype was absent, is now "bfloat16"'),
    ],
)
def test_another_run_is_refused(settings: list[str], change: str, named: str) -> None:
    sample(recipe(settings))
    refused(f"holds another run: {re.escape(named)}", recipe(settings, change))


def test_another_model_is_refused(settings: list[str], make_model: Callable[..., Path]) -> None:
    sample(recipe(settings))
    other = make_model("other", seed=1)
    refused("holds another run: model was .* is now", recipe(settings, f"model={other}"))


def test_a_draft_samples_and_is_part_of_what_a_run_is(
    settings: list[str],
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[int, int]] = []
    looks = Speculative.looks

    def watched(self: Speculative, *values: Any) -> Iterator[list[Finished]]:
        asked.append((self.tokens, self.slots))
        return looks(self, *values)

    monkeypatch.setattr(Speculative, "looks", watched)
    drafted = [*settings, f"draft.model={make_model('small', seed=1)}", "draft.tokens=2"]
    folder = sample(recipe(drafted, "sampling.temperature=0"))
    assert asked == [(2, 5)]
    verified, accepted = Run.open(folder).timing.read(["verifications", "accepted"]).columns
    mean = sum(accepted.to_pylist()) / sum(verified.to_pylist())
    assert 0 <= mean <= 2
    assert "accepted" in capfd.readouterr().err
    plain = sample(recipe(settings, "sampling.temperature=0", f"out={folder}-plain"))
    assert said(folder) == said(plain)
    refused(
        "draft.tokens was 2, is now 3", recipe(drafted, "sampling.temperature=0", "draft.tokens=3")
    )
    refused("draft.model was .* is now absent", recipe(settings, "sampling.temperature=0"))


def test_the_same_model_may_have_moved(settings: list[str], tmp_path: Path) -> None:
    before = parts(sample(recipe(settings)))
    (tmp_path / "tiny").rename(tmp_path / "moved")
    assert parts(sample(recipe(settings, f"model={tmp_path / 'moved'}"))) == before


def test_prompt_and_answer_must_fit_the_positions(
    settings: list[str], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    short = make_model("short", max_position=200)
    longest = max(row["prompt_tokens"] for row in rows(sample(recipe(settings))).values())
    assert longest < 200
    fits = [f"model={short}", f"out={tmp_path / 'fits'}"]
    message = f"sampling.max_tokens = {201 - longest}: .* at most {200 - longest} fit"
    asked = recipe(settings, *fits, f"sampling.max_tokens={201 - longest}")
    with pytest.raises(ValueError, match=message):
        sample(asked)
    assert not asked.out.exists()
    sample(recipe(settings, *fits, f"sampling.max_tokens={200 - longest}"))


def test_without_attention_no_position_is_too_far(
    settings: list[str], make_model: Callable[..., Path]
) -> None:
    pure = make_model("pure", layers="mm", max_position=16)
    assert len(rows(sample(recipe(settings, f"model={pure}")))) == 12


def test_a_device_that_is_not_there_is_refused(settings: list[str]) -> None:
    for dtype in ("null", "float32"):
        with pytest.raises(ValueError, match="device 'abacus'"):
            sample(recipe(settings, "device=abacus", f"dtype={dtype}"))


# Problems from a file


@pytest.fixture
def jsonl(settings: list[str], tmp_path: Path) -> Callable[..., SampleRecipe]:
    """A recipe with these rows in its file of problems."""

    def make(*problems: Row) -> SampleRecipe:
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in problems))
        kept = [each for each in settings if not each.startswith("problems.")]
        return recipe(kept, "problems.kind=jsonl", f"problems.path={path}")

    return make


def test_row_without_an_answer_is_named(jsonl: Callable[..., SampleRecipe]) -> None:
    asked = jsonl({"question": "1 + 1?", "answer": "2"}, {"question": "1 + 2?"})
    with pytest.raises(ValueError, match=r"problems\.jsonl:2: no 'answer' in this row"):
        sample(asked)
    assert not asked.out.exists()


def test_problem_that_reads_differently_is_refused(jsonl: Callable[..., SampleRecipe]) -> None:
    first = {"id": "a", "question": "1 + 1?", "answer": "2"}
    second = {"id": "b", "question": "1 + 2?", "answer": "3"}
    sample(jsonl(first, second))
    refused("problem b: its text differs", jsonl(first, second | {"question": "1 + 3?"}))
    refused("problem b: its text differs", jsonl(first, second | {"answer": "4"}))
    refused("problem b: its text differs", jsonl({**first, "id": "c"}, {**first, "id": "b"}))


def test_a_refused_run_says_nothing_new(jsonl: Callable[..., SampleRecipe]) -> None:
    first = {"id": "a", "question": "1 + 1?", "answer": "2"}
    asked = jsonl(first)
    sample(asked)
    more = asked.model_copy(update={"sampling": asked.sampling.model_copy(update={"n": 9})})
    jsonl(first | {"answer": "3"})
    refused("problem a: its text differs", more)
    assert Run.open(asked.out).manifest["n"] == 3


def test_problem_that_is_added_to_the_file_is_sampled(jsonl: Callable[..., SampleRecipe]) -> None:
    first = {"id": "a", "question": "1 + 1?", "answer": "2"}
    before = parts(sample(jsonl(first)))
    folder = sample(jsonl({"id": "b", "question": "1 + 2?", "answer": "3"}, first))
    assert before.items() <= parts(folder).items()
    assert rows(folder).keys() == {(name, j) for name in "ab" for j in range(3)}
