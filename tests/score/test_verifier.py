"""Verifiers: what they see, what they learn of a run, and scores by them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import retort
from retort.data.chat import ask, prompt_ids
from retort.grade import GRADER_VERSION, Verdict, extract
from retort.model.decoder import Decoder
from retort.recipe import Rollouts, ScoreRecipe, VerifierRecipe
from retort.report.reliability import calibration_error, ranking, reliability
from retort.sample.engine import Engine, Request
from retort.sample.tokens import SamplingParams
from retort.score import rollouts
from retort.score.calibration import balanced, platt
from retort.score.examples import Example, split_by_problem
from retort.score.features import features
from retort.score.head import Examples, fit_head
from retort.score.reading import Reading, continuation
from retort.score.run import score
from retort.score.training import train_verifier
from retort.store import Run

from .conftest import TEXTS, complete

Make = Callable[..., Decoder]
PROMPT = "Solve: {question}"
RIGHT = "2 + 3 = 5.\n\nThe final answer is 5."
WRONG = "2 + 3 = 6, apples and pears.\n\nThe final answer is 6."


# What a verifier sees.


def test_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    found = continuation(tokenizer, PROMPT, "How many?", TEXTS[2], every_step=True)
    assert found.ids[: found.start] == prompt_ids(tokenizer, ask(PROMPT, "How many?"))
    whole = [tokenizer.decode(found.ids[found.start : at + 1]) for at in found.at]
    ends = ["First 2 + 1.", "says Ben.", "So 6.", "The final answer is 6."]
    assert [text[-len(end) :] for text, end in zip(whole, ends, strict=True)] == ends
    last = continuation(tokenizer, PROMPT, "How many?", TEXTS[2] + "\n\n", every_step=False)
    assert last.at == found.at[-1:]
    assert continuation(tokenizer, PROMPT, "How many?", " \n", every_step=False).at == []


def naive_features(decoder: Decoder, ids: list[int], start: int) -> torch.Tensor:
    """Of the last token, which is read with those before it alone."""
    with torch.no_grad():
        h_TD = decoder.hidden(torch.tensor([ids]))[0]
        logprobs = [
            decoder(torch.tensor([ids[:i]]))[0, -1].log_softmax(-1)[ids[i]]
            for i in range(start, len(ids))
        ]
    told = torch.stack(logprobs)
    numbers = torch.stack([told.min(), told.mean(), told.sum()])
    return torch.cat([h_TD[-1], h_TD[start:].mean(0), numbers])


@pytest.mark.parametrize("layers", ["am", "s", "a"])
def test_features(make_decoder: Make, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retort.score.features.CHUNK_TOKENS", 7)
    decoder = make_decoder(layers)
    readings = [
        Reading(torch.randint(1, 61, (n,)).tolist(), at, start)
        for n, at, start in [(12, [4, 7, 11], 3), (5, [4], 2), (9, [1, 8], 1)]
    ]
    naive = [naive_features(decoder, r.ids[: at + 1], r.start) for r in readings for at in r.at]
    assert torch.allclose(features(decoder, readings), torch.stack(naive), atol=2e-5)


# Fitting and calibrating.


def planted(n: int, seed: int = 0) -> Examples:
    """Right with the probability that one small feature says; the large ones say nothing."""
    torch.manual_seed(seed)
    x_NF = torch.randn(n, 9) * torch.tensor([100.0] * 8 + [0.01]) + 5
    chance_N = (300 * (x_NF[:, 8] - 5) - 4).sigmoid()
    return Examples(x_NF, (torch.rand(n) < chance_N).float(), torch.ones(n))


def test_head_finds_what_matters_and_is_calibrated() -> None:
    raw, head = fit_head(planted(2000), planted(2000, 1), [8, 1])
    test = planted(4000, 2)
    truth_N = (300 * (test.x_NF[:, 8].double() - 5) - 4).sigmoid()
    score_N = head.logits(test.x_NF).sigmoid()
    assert (score_N - truth_N).abs().mean() < 0.03
    before_N = raw.logits(test.x_NF).sigmoid()
    score, before, *truth = (
        each.double().numpy() for each in (score_N, before_N, test.y_N, test.weight_N)
    )
    bins = reliability(score, *truth)
    assert calibration_error(bins) < 0.03 < 0.1 < calibration_error(reliability(before, *truth))
    assert ranking(score, *truth) > 0.9


def test_weight_is_repetition() -> None:
    once = planted(300)
    weight_N = torch.randint(1, 4, (300,))
    weighted = Examples(once.x_NF, once.y_N, weight_N.float())
    rows = torch.arange(300).repeat_interleave(weight_N)
    repeated = Examples(once.x_NF[rows], once.y_N[rows], torch.ones(len(rows)))
    _, ours = fit_head(once, weighted, [8, 1])
    _, theirs = fit_head(once, repeated, [8, 1])
    assert torch.allclose(ours.slope_F, theirs.slope_F, rtol=1e-4, atol=1e-9)


def test_balance() -> None:
    y_N, weight_N = torch.tensor([1.0, 0, 0, 0.25]), torch.tensor([1.0, 2, 3, 4])
    found_N = balanced(y_N, weight_N)
    assert found_N.sum().item() == pytest.approx(2)
    assert found_N[0].item() == pytest.approx(1 / 2)  # of 1 + 4/4 that is right


def test_platt_stays_finite_where_all_is_clear() -> None:
    scale, shift = platt(
        torch.tensor([-2.0, -1, 1, 2]), torch.tensor([0.0, 0, 1, 1]), torch.ones(4)
    )
    assert 0 < scale < 100
    assert abs(shift) < 1e-4


def test_no_problem_on_both_sides() -> None:
    examples = [Example(str(i % 20), Reading([1], [0]), [1.0], 1) for i in range(60)]
    parts = split_by_problem(examples, seed=0)
    ids = [{each.problem_id for each in part} for part in parts]
    assert [len(each) for each in ids] == [12, 4, 4]
    assert len(set.union(*ids)) == 20
    assert split_by_problem(examples, seed=0) == parts != split_by_problem(examples, seed=1)


# Roll-outs.


def test_rollouts_are_those_of_each_prefix_alone(
    make_decoder: Make, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "Grader", Parity)
    decoder = make_decoder("am", vocab_size=len(tokenizer), eos_token_ids=tuple(range(0, 99, 4)))
    found = Reading(tokenizer.encode("How many? First 2 + 1.\n\nThen 3."), [6, 9, 12], 3)
    starts = dict.fromkeys(rollouts.prefixes("a", found), 3)
    assert [len(ids) for _, ids in starts] == [7, 10, 13]
    params = SamplingParams(n=6, max_tokens=5, seed=1)
    values = rollouts.values(Engine(decoder, 4), tokenizer, starts, {"a": "5"}, params)
    for prefix in starts:
        seeds = list(rollouts._seeds(prefix, 6, 1))
        right = 0
        for seed in seeds:
            (done,) = Engine(decoder, 1).stream([Request(list(prefix[1]), [seed])], params)
            whole = tokenizer.decode(
                [*prefix[1][3:], *done.completion.token_ids], skip_special_tokens=True
            )
            right += len(whole) % 2
        assert values[prefix] == right / 6
    assert 0 < sum(values.values()) < 3
    one, other = (rollouts._seeds(("a", ids), 2, 0) for ids in ((1, 2), (2, 1)))
    assert set(one).isdisjoint(other)


class Parity:
    """A grader to whom texts of odd length are right."""

    def __enter__(self) -> "Parity":
        return self

    def __exit__(self, *reason: object) -> None:
        pass

    def grade(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        assert {gold for gold, _ in pairs} == {"5"}
        return [Verdict(None, None, len(text) % 2 == 1, "string") for _, text in pairs]


# Training on a run, and scoring with what comes of it.


@pytest.fixture
def student(tmp_path: Path, make_decoder: Make, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    retort.save(make_decoder("am", vocab_size=len(tokenizer)), tmp_path / "student", tokenizer)
    return tmp_path / "student"


@pytest.fixture
def lessons(tmp_path: Path) -> Run:
    """Twenty problems, each answered right and wrong in words that differ."""
    sampling = {"n": 2, "max_tokens": 4, "temperature": 1.0, "seed": 0}
    facts = {"name": "m", "n": 3, "recipe": {"prompt": PROMPT, "sampling": sampling}}
    made = Run.start(tmp_path / "lessons", {"model": "m"}, facts)
    for i in range(20):
        id, question = f"p{i}", f"How many apples do 2 and 3 make, {i} times?"
        made.problems.append([{"problem_id": id, "question": question, "answer": "5"}])
        complete(made, id, [RIGHT, f"{i} {WRONG}", RIGHT])
        made.verdicts(GRADER_VERSION).append([verdict(id, j, j != 1) for j in range(3)])
    return made


def verdict(id: str, sample: int, correct: bool) -> dict[str, Any]:
    answer = "5" if correct else "6"
    row = {"problem_id": id, "sample_idx": sample, "answer": answer, "group": answer}
    return row | {"correct": correct, "method": "string"}


def recipe(run: Run, student: Path, tmp_path: Path, **settings: Any) -> VerifierRecipe:
    return VerifierRecipe(run=run.folder, model=student, out=tmp_path / "verifier", **settings)


def test_a_run_with_shots_is_refused(lessons: Run, student: Path, tmp_path: Path) -> None:
    shown = {
        **lessons.manifest,
        "recipe": {**lessons.manifest["recipe"], "shots": {"kind": "gsm8k"}},
    }
    (lessons.folder / "run.json").write_text(json.dumps(shown))
    with pytest.raises(ValueError, match="was sampled with shots"):
        train_verifier(recipe(lessons, student, tmp_path))
    assert not (tmp_path / "verifier").exists()


def test_verifier_of_whole_answers(lessons: Run, student: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in lessons.folder.rglob("part-*")}
    found = train_verifier(recipe(lessons, student, tmp_path))
    assert (found.problems, found.texts, found.held_out_problems) == (20, 40, 4)
    assert found.right == pytest.approx(2 / 3)
    assert found.ranking == 1
    written = json.loads((tmp_path / "verifier" / "reliability.json").read_text())
    assert written["error"] == found.error
    assert len(written["bins"]) == len(found.bins)
    assert {path: path.read_bytes() for path in before} == before

    score(ScoreRecipe(run=lessons.folder, model=tmp_path / "verifier", kind="verifier"))
    scorer = json.loads((lessons.folder / "scores-verifier" / "scorer.json").read_text())
    assert (scorer["kind"], scorer["scale"]) == ("outcome", "probability")
    rows = lessons.scores("verifier").read().to_pylist()
    assert all(len(row["scores"]) == 1 and 0 < row["scores"][0] < 1 for row in rows)
    right = [row["scores"][0] for row in rows if row["sample_idx"] != 1]
    wrong = [row["scores"][0] for row in rows if row["sample_idx"] == 1]
    assert min(right) > max(wrong)


def test_verifier_of_steps(
    lessons: Run, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def values(engine: Any, tokenizer: Any, starts: Any, golds: Any, params: Any) -> Any:
        asked.append((len(starts), set(golds.values()), params.n, params.temperature, params.seed))
        return dict.fromkeys(starts, 0.5)

    monkeypatch.setattr("retort.score.training.values", values)
    settings = {"rollouts": Rollouts(n=3, completions=1), "seed": 2}
    found = train_verifier(recipe(lessons, student, tmp_path, **settings))
    assert asked == [(20, {"5"}, 3, 1.0, 2)]
    assert found.positions == 40
    score(ScoreRecipe(run=lessons.folder, model=tmp_path / "verifier", kind="verifier", name="v"))
    rows = lessons.scores("v").read().to_pylist()
    assert {len(row["scores"]) for row in rows} == {2}
    scorer = json.loads((lessons.folder / "scores-v" / "scorer.json").read_text())
    assert (scorer["kind"], scorer["scale"]) == ("process", "probability")


def test_rollouts_of_a_run(lessons: Run, student: Path, tmp_path: Path) -> None:
    settings = {"rollouts": Rollouts(n=1, completions=2, slots=8)}
    found = train_verifier(recipe(lessons, student, tmp_path, **settings))
    # No random model reaches the answer: of 3 positions with weight 2, 1, the last are as graded.
    assert found.right == pytest.approx(2 / 6)


def test_same_verifier_twice(lessons: Run, student: Path, tmp_path: Path) -> None:
    train_verifier(recipe(lessons, student, tmp_path))
    first = (tmp_path / "verifier" / "verifier.safetensors").read_bytes()
    train_verifier(recipe(lessons, student, tmp_path))
    assert (tmp_path / "verifier" / "verifier.safetensors").read_bytes() == first


# Mistakes.


def test_run_that_is_not_graded(lessons: Run, student: Path, tmp_path: Path) -> None:
    complete(lessons, "p0", [RIGHT], start=3)
    with pytest.raises(ValueError, match="completions without a verdict; `retort grade"):
        train_verifier(recipe(lessons, student, tmp_path))
    assert not (tmp_path / "verifier").exists()


def test_run_in_which_all_is_right(lessons: Run, student: Path, tmp_path: Path) -> None:
    for path in lessons.verdicts(GRADER_VERSION).part_files():
        path.unlink()
    for i in range(20):
        rows = [verdict(f"p{i}", j, True) for j in range(3)]
        lessons.verdicts(GRADER_VERSION).append(rows)
    with pytest.raises(ValueError, match="one of these has only one kind"):
        train_verifier(recipe(lessons, student, tmp_path))
    assert not (tmp_path / "verifier").exists()


def test_folder_that_holds_something_else(lessons: Run, tmp_path: Path) -> None:
    (tmp_path / "verifier").mkdir()
    (tmp_path / "verifier" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=str(tmp_path / "verifier")):
        train_verifier(recipe(lessons, tmp_path / "found out before this is read", tmp_path))


def test_folder_that_is_no_verifier(lessons: Run, student: Path) -> None:
    settings = {"run": lessons.folder, "model": student, "kind": "verifier"}
    with pytest.raises(ValueError, match=r"no verifier here \(verifier.json is missing\)"):
        score(ScoreRecipe(**settings))
    assert lessons.score_names() == []


@pytest.mark.parametrize("damage", ["verifier.json", "verifier.safetensors"])
def test_damaged_verifier(lessons: Run, student: Path, tmp_path: Path, damage: str) -> None:
    train_verifier(recipe(lessons, student, tmp_path))
    path = tmp_path / "verifier" / damage
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=damage):
        score(ScoreRecipe(run=lessons.folder, model=tmp_path / "verifier", kind="verifier"))


def test_planted_texts_mean_what_they_say() -> None:
    assert (extract(RIGHT), extract(WRONG)) == ("5", "6")
