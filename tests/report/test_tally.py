from collections.abc import Callable
from dataclasses import replace

import pytest

from retort.report import build
from retort.report.metrics import VoteGroup
from retort.report.tally import Tally, check_comparable, common_version, tally
from retort.store import Run

from .conftest import timing
from .test_choices import scored

MakeRun = Callable[..., Run]

RIGHT = "42"
OUTCOMES = {"b": [RIGHT, "7", "7", None], "a": [RIGHT, RIGHT, "7", RIGHT]}


def counted(run: Run) -> Tally:
    return tally(run, "1")


def test_counts_are_those_of_the_verdicts(make_run: MakeRun) -> None:
    result = counted(make_run("m", OUTCOMES, tokens_per_second=500, tokens=20))
    assert (result.problem_ids, result.samples) == (("a", "b"), 4)
    assert result.correct_P.tolist() == [3, 1]
    assert [sorted(groups, key=lambda group: group.size) for groups in result.groups_P] == [
        [VoteGroup(1, False), VoteGroup(3, True)],
        [VoteGroup(1, True), VoteGroup(2, False)],
    ]
    assert (result.pace.tokens_per_second, result.pace.mean_tokens) == (500, 20)
    assert (result.slots, result.truncated, result.unanswered) == (8, 0, 1 / 8)


def test_duplicates_count_within_a_problem(make_run: MakeRun) -> None:
    same = make_run("same", OUTCOMES, text=lambda problem, i: "always this")
    assert counted(same).duplicates == 6 / 8
    other = make_run("other", OUTCOMES, text=lambda problem, i: f"answer {i}")
    assert counted(other).duplicates == 0


def test_samples_beyond_n_are_left_out(make_run: MakeRun) -> None:
    run = make_run("m", OUTCOMES)
    smaller = Run.start(run.folder, {"seed": 0}, {"n": 2})
    result = counted(smaller)
    assert (result.samples, result.correct_P.tolist()) == (2, [2, 1])


def test_incomplete_run_names_the_command(make_run: MakeRun) -> None:
    run = make_run("m", {"a": [RIGHT] * 4, "b": [RIGHT], "c": []})
    with pytest.raises(ValueError, match=r"2 of 3 problems .* 4 completions \(7 in all\).*sample"):
        counted(run)


def test_run_without_problems(make_run: MakeRun) -> None:
    run = make_run("m", {"a": []}, grader=None)
    for part in run.problems.part_files():
        part.unlink()
    with pytest.raises(ValueError, match="no problems"):
        counted(run)


def test_partly_graded_run_names_the_command(make_run: MakeRun) -> None:
    run = make_run("m", OUTCOMES, grader=None)
    kept = make_run("kept", OUTCOMES).verdicts("1").read().to_pylist()[:5]
    with run.lock():
        run.verdicts("1").append(kept)
    with pytest.raises(
        ValueError, match=f"3 completions are not graded; run `retort grade {run.folder}"
    ):
        counted(run)


def test_a_run_killed_before_its_first_completions_is_named(make_run: MakeRun) -> None:
    run = make_run("m", {"a": []}, grader=None)
    with pytest.raises(ValueError, match=r"no completions yet; repeat its `retort sample`"):
        common_version([make_run("other", OUTCOMES), run])


def test_run_without_timing(make_run: MakeRun) -> None:
    run = make_run("m", OUTCOMES)
    for part in run.timing.part_files():
        part.unlink()
    with pytest.raises(ValueError, match="no decode times"):
        counted(run)


def test_clocks_are_read_as_they_were_written(make_run: MakeRun) -> None:
    run = make_run("m", OUTCOMES)
    scored(run, "judge", lambda i: [0.5], "probability")
    newer = timing(1000) | {"starts": 10, "start_seconds": 2.0, "look": 3}
    newer |= {"share_from": 2048}
    with run.lock():
        run.timing.append([newer | {"verifications": 4, "accepted": 6}])
        run.scoring("judge").append([{"completions": 5, "seconds": 1.0}] * 2)
    result = counted(run)
    assert result.times is not None
    assert (result.times.start, result.times.tokens, result.times.look) == (0.2, 2.5, 3)
    assert result.times.share_from == 2048
    assert result.scoring_seconds == {"judge": 0.2}
    assert result.decode_seconds == 20
    assert result.rows == 100  # 10,000 tokens in 100 steps


@pytest.mark.parametrize(
    ("share_from", "slots", "prompts"), [(None, 8, 8), (0, 8, 2), (20, 8, 2), (21, 8, 8), (0, 2, 1)]
)
def test_a_step_reads_a_prompt_once_for_the_rows_that_share_it(
    make_run: MakeRun, share_from: int | None, slots: int, prompts: int
) -> None:
    result = counted(make_run("m", OUTCOMES, tokens=20))
    assert result.times is not None
    assert result.samples == 4
    times = replace(result.times, share_from=share_from)
    # completions of 20 tokens, whose steps see 1 to 20 of them, and prompts of 5
    assert build._context(result, times, slots) == slots * 10.5 + prompts * 5


def test_scores_that_were_not_timed_have_no_seconds(make_run: MakeRun) -> None:
    run = make_run("m", OUTCOMES)
    scored(run, "judge", lambda i: [0.5], "probability")
    assert counted(run).scoring_seconds == {}


def test_answer_with_two_verdicts(make_run: MakeRun) -> None:
    run = make_run("m", OUTCOMES, grader=None)
    rows = make_run("other", OUTCOMES).verdicts("1").read().to_pylist()
    rows[1]["correct"] = True
    with run.lock():
        run.verdicts("1").append(rows)
    with pytest.raises(ValueError, match="problem b the answer '7' is judged both right and wrong"):
        counted(run)


def test_newest_common_grader_version_counts(make_run: MakeRun) -> None:
    first, second = make_run("first", OUTCOMES), make_run("second", OUTCOMES)
    rows = first.verdicts("1").read().to_pylist()
    for run, versions in [(first, ["2", "10", "11"]), (second, ["2", "10"])]:
        for version in versions:
            run.verdicts(version).append(rows)
    assert common_version([first, second]) == "10"


def test_ungraded_run_names_the_command(make_run: MakeRun) -> None:
    run = make_run("m", OUTCOMES, grader=None)
    with pytest.raises(ValueError, match=f"not graded; run `retort grade {run.folder}`"):
        common_version([run])


def test_runs_of_different_graders_do_not_compare(make_run: MakeRun) -> None:
    runs = [make_run("first", OUTCOMES, grader="1"), make_run("second", OUTCOMES, grader="2")]
    with pytest.raises(ValueError, match="no grader version judged every run"):
        common_version(runs)


def test_runs_of_different_problems_do_not_compare(make_run: MakeRun) -> None:
    first = counted(make_run("first", OUTCOMES))
    second = counted(make_run("second", {"a": [RIGHT], "c": [RIGHT], "d": [RIGHT]}))
    with pytest.raises(
        ValueError, match=r"1 of 2 are only in the first, 2 of 3 only in the second"
    ):
        check_comparable([first, second])


def test_two_runs_of_one_name_do_not_compare(make_run: MakeRun) -> None:
    run = counted(make_run("twin", OUTCOMES))
    with pytest.raises(ValueError, match="2 runs are named 'twin'"):
        check_comparable([run, run])


def test_equal_answers_vote_together(make_run: MakeRun) -> None:
    run = make_run("m", {"a": [RIGHT, "8!", "40320", None]})
    assert [group.size for group in counted(run).groups_P[0]] == [1, 1, 1]
    groups = {RIGHT: RIGHT, "8!": "40320", "40320": "40320"}
    rows = [{"problem_id": "a", "key": key, "group": group} for key, group in groups.items()]
    votes = run.votes("1")
    votes.replace(rows)
    (found,) = counted(run).groups_P
    assert sorted(found, key=lambda group: group.size) == [VoteGroup(1, True), VoteGroup(2, False)]
    votes.replace(rows[:2])
    with pytest.raises(ValueError, match=f"1 answers have no .* `retort grade {run.folder}`"):
        counted(run)
