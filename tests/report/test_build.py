import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retort.report import build as module
from retort.report.build import build, default_ks
from retort.report.curves import Curves
from retort.report.metrics import wilson
from retort.report.tally import tally
from retort.report.wording import budget_note, headline, percent, seconds, shared_ks
from retort.store import Run

MakeRun = Callable[..., Run]

RIGHT = "42"
SURE = {"a": [RIGHT] * 4, "b": [RIGHT] * 4}
EVEN = {"a": [RIGHT, RIGHT, "7", "8"], "b": [None, "7", "7", RIGHT]}


def built(*runs: Run, ks: list[int] | None = None) -> Curves:
    return build([tally(run, "1") for run in runs], ks)


def test_points_are_the_planted_values(make_run: MakeRun) -> None:
    (model,) = built(make_run("m", EVEN, tokens_per_second=100, tokens=50)).models
    assert [point.k for point in model.points] == [1, 2, 4]
    assert [point.seconds for point in model.points] == pytest.approx([0.5, 1.0, 2.0])
    coverage = [point.coverage.value for point in model.points]
    assert coverage == pytest.approx([(2 / 4 + 1 / 4) / 2, (5 / 6 + 3 / 6) / 2, 1])
    # two of b's pairs hold its right answer and a wrong one, one holds it alone
    majority = [point.majority.value for point in model.points]
    assert majority == pytest.approx([0.375, ((1 + 4 / 2) / 6 + (1 + 2 / 2) / 6) / 2, 0.5])
    assert model.points[0].coverage == wilson(0.375, 2)


def test_model_carries_the_facts_of_its_run(make_run: MakeRun) -> None:
    (model,) = built(make_run("m", SURE)).models
    assert (model.name, model.parameters, model.problems, model.samples) == ("m", 1_500_000, 2, 4)
    assert (model.device, model.versions) == ("test device", {"retort": "0.1.0"})
    assert model.recipe == {"sampling": {"n": 4}}


def test_default_ks_are_powers_of_two_and_n() -> None:
    assert default_ks(1) == [1]
    assert default_ks(8) == [1, 2, 4, 8]
    assert default_ks(11) == [1, 2, 4, 8, 11]


def test_asked_ks_are_kept(make_run: MakeRun) -> None:
    (model,) = built(make_run("m", SURE), ks=[3, 1, 3]).models
    assert [point.k for point in model.points] == [1, 3]


def test_k_beyond_the_samples_says_what_to_do(make_run: MakeRun) -> None:
    run = make_run("m", SURE)
    message = rf"k = 64 asked, but run {run.folder} holds 4 completions for problem a .*n=64"
    with pytest.raises(ValueError, match=message):
        built(run, ks=[1, 64])
    with pytest.raises(ValueError, match="k = 0 asked"):
        built(run, ks=[0])


def test_budget_is_the_longest_that_all_models_fill(make_run: MakeRun) -> None:
    quick = make_run("quick", EVEN, tokens_per_second=400)
    slow = make_run("slow", SURE, tokens_per_second=100)
    comparison = built(slow, quick).comparison
    assert comparison.seconds == pytest.approx(4 * 10 / 400)
    standings = {standing.name: standing for standing in comparison.standings}
    assert standings["quick"].k == pytest.approx(4)
    assert standings["slow"].k == pytest.approx(1)
    assert budget_note(comparison).endswith("slow makes 1 completion, quick 4.")


def test_a_fraction_of_a_completion_reaches_a_fraction_of_the_problems(make_run: MakeRun) -> None:
    quick = make_run("quick", EVEN, tokens_per_second=4000)
    slow = make_run("slow", SURE, tokens_per_second=100)
    leader, last = built(slow, quick).comparison.standings
    assert (leader.name, last.name) == ("quick", "slow")
    assert [last.k, last.coverage.value] == pytest.approx([0.1, 0.1])
    assert [leader.behind.value, last.behind.value] == pytest.approx([0, 0.9])


def test_headline_names_the_better_model_whichever_it_is(make_run: MakeRun) -> None:
    good = make_run("good", {f"p{i}": [RIGHT, RIGHT] for i in range(40)})
    bad = make_run("bad", {f"p{i}": [RIGHT if i < 10 else "7"] * 2 for i in range(40)})
    for curves in (built(good, bad), built(bad, good)):
        sentence = headline(curves).replace("\N{NARROW NO-BREAK SPACE}", " ")
        assert sentence.startswith(
            "In 20 ms of decoding per problem, good covers 100 % (91–100) of"
        )
        assert "problems, bad 25 % (14–40)." in sentence
        assert "good leads bad by 75.0 percentage points (60.0 to 87.5)." in sentence


def test_headline_says_when_it_could_be_chance(make_run: MakeRun) -> None:
    one = make_run("one", {f"p{i}": [RIGHT if i < 6 else "7"] for i in range(12)})
    two = make_run("two", {f"p{i}": [RIGHT if i > 6 else "7"] for i in range(12)})
    assert "could be chance" in headline(built(one, two))
    assert headline(built(one)).endswith("of the problems.")


def test_json_holds_the_curves(make_run: MakeRun) -> None:
    curves = built(make_run("m", EVEN))
    document = json.loads(curves.to_json())
    assert document["format"] == 4
    assert document["grader"] == "1"
    point = document["models"][0]["points"][0]
    assert point["k"] == 1
    assert point["coverage"]["value"] == pytest.approx(0.375)
    assert document["comparison"]["standings"][0]["name"] == "m"


def test_curves_of_another_release_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    curves = built(make_run("m", SURE))
    path.write_text(curves.to_json())
    assert Curves.read(path) == curves
    path.write_text('{"format": 1, "models": []}')
    with pytest.raises(ValueError, match="format 1 of another release, and this one reads 4"):
        Curves.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"not the curves\.json of a report"):
        Curves.read(path)


def test_percent_is_0_or_100_only_when_it_is() -> None:
    shares = [0, 0.001, 0.005, 0.874, 0.995, 1]
    assert [percent(share) for share in shares] == ["0", "<1", "<1", "87", ">99", "100"]


def test_times_keep_two_figures() -> None:
    times = [seconds(s) for s in (0.00042, 0.0042, 0.042, 4.2)]
    assert times == ["0.42 ms", "4.2 ms", "42 ms", "4.2 s"]


def test_summary_takes_the_ks_that_exist(make_run: MakeRun) -> None:
    models = built(make_run("m", SURE), ks=[1, 2, 4]).models
    assert shared_ks(models, (1, 2)) == [1, 2]
    assert shared_ks(models, (1, 8, 32)) == [1, 4]
    assert shared_ks(built(make_run("other", SURE), ks=[3, 4]).models, (1, 2)) == [4]


def test_very_many_votes_are_counted_in_random_orders(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = {f"p{i}": ([RIGHT] * i + ["7"] * 6 + [None] * 2 + ["8"] * 8)[:16] for i in range(9)}
    run = tally(make_run("m", outcomes), "1")
    exact = module.votes_over(run, [1, 5, 16])
    monkeypatch.setattr(module, "EXACT_VOTES", 0)
    sampled = module.votes_over(run, [1, 5, 16])
    np.testing.assert_allclose(sampled[:, [0, 2]], exact[:, [0, 2]], atol=1e-12)
    assert 0 < np.abs(sampled[:, 1] - exact[:, 1]).max() < 4 * 0.5 / 20


# Costs and comparisons


def test_a_replay_of_equal_lengths_is_the_conversion(make_run: MakeRun) -> None:
    # two problems of four completions fill the eight slots: nine steps, the prompt gives the tenth
    (model,) = built(make_run("m", EVEN, tokens_per_second=1000, tokens=10)).models
    last = model.points[-1]
    assert last.seconds == pytest.approx(4 * 10 / 1000)
    assert last.cost.replayed == pytest.approx(9 * 8 / 1000 / 2, rel=0.01)
    assert last.cost.tokens == 40
    # four rows by themselves take less than eight, and more than one
    assert last.cost.alone is not None
    assert 9 * 0.25 * 8 / 1000 < last.cost.alone < 9 * 8 / 1000
    assert model.points[0].cost.alone == pytest.approx(9 * 0.25 * 8 / 1000, rel=0.01)
    assert model.prefill_seconds == 5.0  # of five tokens, at a token a second
    assert model.replay_ratio == pytest.approx(9 * 8 / 1000 / 10, rel=0.01)


def test_a_run_without_times_of_steps_has_no_replay(make_run: MakeRun) -> None:
    run = make_run("m", EVEN)
    for part in run.steps.part_files():
        part.unlink()
    curves = built(run)
    (model,) = curves.models
    assert model.replay_ratio is None
    assert {(point.cost.replayed, point.cost.alone) for point in model.points} == {(None, None)}
    assert {each.slots for each in curves.comparisons.candidates} == {8}


def test_work_needs_what_a_token_takes(make_run: MakeRun) -> None:
    run = make_run("m", EVEN, tokens=10)
    (model,) = built(run).models
    assert (model.points[0].cost.flops, model.points[0].cost.bytes) == (None, None)
    token = {"flops": 7, "flops_per_context": 0, "weight_bytes": 0, "row_bytes": 3}
    manifest = run.manifest | {"model": run.manifest["model"] | {"token": token}}
    with pytest.raises(ValueError, match=r"run\.json: model\.token is damaged"):
        built(Run(run.folder, manifest))
    token["bytes_per_context"] = 0
    (model,) = built(Run(run.folder, manifest)).models
    assert [point.cost.flops for point in model.points] == [70, 140, 280]
    assert [point.cost.bytes for point in model.points] == [30, 60, 120]


def test_slots_of_the_front(make_run: MakeRun) -> None:
    found = built(make_run("m", EVEN, tokens_per_second=1000)).comparisons.candidates
    seconds = {each.slots: each.seconds for each in found if each.k == 4}
    assert seconds.keys() == {8, 2}
    assert seconds[2] > seconds[8]


def test_the_reference_and_prices_are_named(make_run: MakeRun) -> None:
    runs = [tally(make_run(name, EVEN), "1") for name in ("a", "b", "c")]
    curves = build(runs, reference="b", prices={"": 2.0, "c": 3.0})
    assert curves.comparisons.reference == "b"
    assert {each.name for each in curves.comparisons.crossovers} == {"a", "c"}
    assert [model.price for model in curves.models] == [2, 2, 3]
    assert [model.price for model in build(runs, prices={"c": 3.0}).models] == [None, None, 3]
    for wrong in ({"reference": "d"}, {"prices": {"d": 1.0}}):
        with pytest.raises(ValueError, match="no run is named 'd'; there are a, b, c"):
            build(runs, **wrong)


def test_the_default_reference_is_the_first(make_run: MakeRun) -> None:
    assert built(make_run("a", EVEN), make_run("b", EVEN)).comparisons.reference == "a"
