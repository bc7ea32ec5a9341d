"""Scoring a run: every completion once, whatever was interrupted, and nothing else is touched."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from retort.cli import main
from retort.recipe import RecipeError, ScoreRecipe, load
from retort.score import run as scoring
from retort.score.batches import batches
from retort.score.loading import open_model
from retort.score.models import PlusMinus
from retort.score.run import ScoreSummary, score
from retort.store import Run

from .conftest import QUESTIONS, TEXTS, Make, complete


def recipe(run: Run, model: Path, kind: str = "rlhflow", **settings: Any) -> ScoreRecipe:
    return ScoreRecipe(run=run.folder, model=model, kind=kind, **settings)


def scores(run: Run, name: str = "rlhflow") -> dict[tuple[str, int], list[float]]:
    rows = run.scores(name).read().to_pylist()
    found = {(row["problem_id"], row["sample_idx"]): row["scores"] for row in rows}
    assert len(found) == len(rows), "each completion has one row"
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_beside_the_completions(run: Run, make_model: Make) -> None:
    summary = score(recipe(run, make_model("rlhflow")))
    assert summary == ScoreSummary(scored=12, total=12, without_score=2)
    found = scores(run)
    assert found.keys() == run.completions.keys()
    assert [len(found["a", i]) for i in range(6)] == [2, 1, 4, 0, 2, 2]
    assert found["a", 0] == found["a", 4] != found["b", 0]
    assert run.score_names() == ["rlhflow"]
    timing = run.scoring("rlhflow").read().to_pylist()
    assert sum(row["completions"] for row in timing) == 12
    assert all(row["seconds"] > 0 for row in timing)


def test_scorer_json(run: Run, make_model: Make) -> None:
    score(recipe(run, make_model("outcome"), "outcome", name="orm"))
    scorer = json.loads((run.folder / "scores-orm" / "scorer.json").read_text())
    assert scorer.keys() >= {"fingerprint", "versions", "model"}
    assert (scorer["kind"], scorer["scale"]) == ("outcome", "logit")
    assert {len(each) for each in scores(run, "orm").values()} == {1}


@pytest.mark.parametrize("kind", ["rlhflow", "qwen"])
def test_process_models_give_probabilities(run: Run, make_model: Make, kind: str) -> None:
    score(recipe(run, make_model(kind), kind))
    scorer = json.loads((run.folder / f"scores-{kind}" / "scorer.json").read_text())
    assert (scorer["kind"], scorer["scale"]) == ("process", "probability")
    assert all(0 <= each <= 1 for found in scores(run, kind).values() for each in found)


def test_batching_does_not_matter(
    run: Run, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("rlhflow")
    sizes = recorded(monkeypatch)
    score(recipe(run, model, name="one", batch_tokens=1))
    assert [len(readings) for readings in sizes] == [1] * 8
    score(recipe(run, model, name="all"))
    assert len(sizes) < 2 * 8
    alone, together = scores(run, "one"), scores(run, "all")
    for key, found in alone.items():
        assert found == pytest.approx(together[key], abs=2e-6)


def test_second_call_does_nothing(
    run: Run, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("rlhflow")
    score(recipe(run, model))
    before = contents(run.folder)
    monkeypatch.setattr(scoring, "open_model", None)
    assert score(recipe(run, model)) == ScoreSummary(0, 12, 2)
    assert contents(run.folder) == before


def test_two_models_leave_all_else_alone(run: Run, make_model: Make) -> None:
    verdict = {"problem_id": "a", "sample_idx": 0, "answer": "5", "group": "5", "correct": True}
    run.verdicts("1").append([verdict | {"method": "string"}])
    before = contents(run.folder)
    score(recipe(run, make_model("rlhflow")))
    score(recipe(run, make_model("outcome"), "outcome"))
    after = contents(run.folder)
    new = {name for name in after if after[name] != before.get(name)} - {".lock"}
    assert {Path(name).parts[0] for name in new} == {"scores-rlhflow", "scores-outcome"}


def test_new_completions_are_added(run: Run, make_model: Make) -> None:
    model = make_model("rlhflow")
    score(recipe(run, model))
    before = scores(run)
    complete(run, "b", ["So 3.\n\nThe final answer is 3."], start=6)
    assert score(recipe(run, model)).scored == 1
    assert scores(run).items() > before.items()


def test_interrupted_scoring_keeps_what_it_has(
    run: Run, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("rlhflow")
    score(recipe(run, model, name="whole"))
    original = PlusMinus.scores
    calls = []

    def interrupted(self: PlusMinus, readings: Any) -> list[list[float]]:
        calls.append(len(readings))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, readings)

    with monkeypatch.context() as patch:
        patch.setattr(PlusMinus, "scores", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(recipe(run, model, batch_tokens=1))
    kept = scores(run)
    assert 2 <= len(kept) < 12
    assert score(recipe(run, model, batch_tokens=1)).scored == 12 - len(kept)
    for key, found in scores(run).items():
        assert found == pytest.approx(scores(run, "whole")[key], abs=2e-6)


def test_damaged_part_is_scored_again(
    run: Run, make_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("rlhflow")
    score(recipe(run, model))
    (part,) = run.scores("rlhflow").part_files()
    part.write_bytes(part.read_bytes()[:-9])
    assert score(recipe(run, model)).scored == 12
    assert "a damaged part, set aside" in capsys.readouterr().err


def test_identical_texts_are_read_once(
    run: Run, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "WINDOW_ROWS", 4)  # the same text is in different windows
    batches = recorded(monkeypatch)
    complete(run, "a", TEXTS, start=6)
    score(recipe(run, make_model("rlhflow")))
    assert sum(map(len, batches)) == 2 * 4  # of six texts one is empty and two are the same


def test_texts_that_are_remembered_are_bounded(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SEEN_TEXTS", 3)
    settings = {"run": Path("unused"), "model": make_model("rlhflow"), "kind": "rlhflow"}
    judge = scoring.Judge(open_model(ScoreRecipe(**settings)), QUESTIONS, 1000)
    assert len(list(judge.scores([("a", f"So {i}.") for i in range(9)]))) == 9
    assert len(judge.seen) == 3


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that process models of RLHFlow's kind are given from now on."""
    original, batches = PlusMinus.scores, []

    def scores(self: PlusMinus, readings: Any) -> list[list[float]]:
        batches.append(readings)
        return original(self, readings)

    monkeypatch.setattr(PlusMinus, "scores", scores)
    return batches


def test_text_without_room_has_no_score(
    run: Run, make_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    complete(run, "a", ["word " * 40], start=6)
    assert score(recipe(run, make_model("rlhflow"))).without_score == 3
    assert scores(run)["a", 6] == []
    assert "1 different completions have more than the 160 tokens" in capsys.readouterr().err


def test_memory_that_runs_out_halves_the_batch(
    run: Run, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("rlhflow")
    score(recipe(run, model, name="whole"))
    original = PlusMinus.scores

    def small(self: PlusMinus, readings: Any) -> list[list[float]]:
        if len(readings) > 2:
            raise MemoryError
        return original(self, readings)

    monkeypatch.setattr(PlusMinus, "scores", small)
    score(recipe(run, model))
    for key, found in scores(run).items():
        assert found == pytest.approx(scores(run, "whole")[key], abs=2e-6)


# Mistakes, found before anything is written.


def test_another_model_under_the_same_name(run: Run, make_model: Make) -> None:
    score(recipe(run, make_model("rlhflow"), name="prm"))
    before = contents(run.folder)
    other = make_model("rlhflow", "other", seed=1)
    with pytest.raises(ValueError, match="scores by another model: fingerprint was"):
        score(recipe(run, other, name="prm"))
    with pytest.raises(ValueError, match="dtype was float32, is now bfloat16"):
        score(recipe(run, other, name="prm", dtype="bfloat16"))
    assert contents(run.folder) == before


def test_scores_of_an_unknown_model(run: Run, make_model: Make) -> None:
    model = make_model("rlhflow")
    score(recipe(run, model))
    (run.folder / "scores-rlhflow" / "scorer.json").unlink()
    with pytest.raises(ValueError, match=r"scores without scorer\.json"):
        score(recipe(run, model))


def test_model_that_does_not_fit_leaves_nothing(run: Run, make_model: Make) -> None:
    with pytest.raises(ValueError, match="and this folder has LlamaForCausalLM"):
        score(recipe(run, make_model("rlhflow"), "qwen"))
    assert run.score_names() == []


def test_scores_that_are_not_finite(
    run: Run, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlusMinus, "scores", lambda self, found: [[float("nan")] for _ in found])
    with pytest.raises(ValueError, match=r"a score is \[nan\]; with dtype=float32"):
        score(recipe(run, make_model("rlhflow")))


def test_completion_of_an_unknown_problem(run: Run, make_model: Make) -> None:
    complete(run, "c", TEXTS[:1])
    with pytest.raises(ValueError, match="completions of problem 'c'"):
        score(recipe(run, make_model("rlhflow")))


def test_scoring_waits_for_no_other_writer(run: Run, make_model: Make) -> None:
    with run.lock(), pytest.raises(ValueError, match="is being written by process"):
        score(recipe(run, make_model("rlhflow")))


def test_starting_over_forgets_scores_and_their_model(run: Run, make_model: Make) -> None:
    score(recipe(run, make_model("rlhflow")))
    Run.start(run.folder, {"model": "other"}, {"name": "m"}, force=True)
    assert run.score_names() == []


@pytest.mark.parametrize("name", ["", "../out", ".hidden", "a/b"])
def test_names_that_are_no_folders(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="name: string should match pattern"):
        load(ScoreRecipe, ["run=r", "model=m", "kind=qwen", f"name={name!r}"])


def test_command(run: Run, make_model: Make, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("rlhflow")
    arguments = ["score", f"run={run.folder}", f"model={model}", "kind=rlhflow", "--json"]
    command(arguments)
    assert json.loads(capsys.readouterr().out) == {"scored": 12, "total": 12, "without_score": 2}
    shutil.rmtree(run.folder / "scores-rlhflow")
    (run.folder / "run.json").unlink()
    with pytest.raises(SystemExit):
        command(arguments)
    assert "error: " in capsys.readouterr().err


def command(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["retort", *arguments])
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise


# Batches.


def test_batches_have_every_item_and_little_padding() -> None:
    lengths = [1, 300, 7, 7, 9, 100, 101, 99, 30, 31, 80, 8, 2, 500]
    found = list(batches([(i, length) for i, length in enumerate(lengths)], 303))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or max(sizes) * len(batch) <= 303
        assert min(sizes) >= 0.75 * max(sizes)
