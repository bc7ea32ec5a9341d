"""What the clocks of a run say: of decoding, of its steps, of reading prompts and of scoring."""

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from retort.report.budget import Pace, TokenWork
from retort.report.steps import StepTimes, fit
from retort.store import Run


def pace(run: Run, timing: pa.Table, completions: pa.Table) -> Pace:
    """How fast the run was decoded. Raises ValueError where nothing was timed."""
    tokens, seconds = _totals(timing, "decode_tokens", "decode_seconds")
    if not tokens or not seconds:
        raise ValueError(
            f"{run.folder} holds no decode times, so seconds are unknown; sample it again "
            "with force=true"
        )
    return Pace(tokens / seconds, pc.mean(completions["token_count"]).as_py())


def step_times(run: Run, timing: pa.Table) -> StepTimes | None:
    """Of the run's steps, as it looked and shared prompts last; None where no steps were timed."""
    steps = run.steps.read()
    if not steps.num_rows:
        return None
    by_rows_B, per_context = fit(steps)
    starts, seconds = _totals(timing, "starts", "start_seconds")
    verifications, accepted = _totals(timing, "verifications", "accepted")
    return StepTimes(
        by_rows_B,
        per_context,
        start=seconds / max(starts, 1),
        tokens=1 + accepted / max(verifications, 1),
        look=timing["look"][-1].as_py(),
        share_from=timing["share_from"][-1].as_py(),
    )


def mean_rows(timing: pa.Table) -> float:
    """Tokens that a decode step wrote, in the mean."""
    tokens, steps = _totals(timing, "decode_tokens", "decode_steps")
    return tokens / max(steps, 1)


def token_work(run: Run) -> TokenWork | None:
    """What decoding a token takes; None where the run does not say.

    Raises ValueError where the run's description is damaged.
    """
    found = run.manifest["model"].get("token")
    try:
        return None if found is None else TypeAdapter(TokenWork).validate_python(found)
    except ValidationError:
        raise ValueError(f"{run.folder / 'run.json'}: model.token is damaged") from None


def prefill_seconds(timing: pa.Table, completions: pa.Table) -> float:
    """Reading a prompt of mean length, as fast as prompts were read in sampling."""
    tokens, seconds = _totals(timing, "prefill_tokens", "prefill_seconds")
    return float(pc.mean(completions["prompt_tokens"]).as_py() * seconds / max(tokens, 1))


def scoring_seconds(run: Run) -> dict[str, float]:
    """Seconds for a completion by scorer, of those that were timed."""
    found = {}
    for name in run.score_names():
        completions, seconds = _totals(run.scoring(name).read(), "completions", "seconds")
        if completions:
            found[name] = seconds / completions
    return found


def _totals(table: pa.Table, *columns: str) -> list[float]:
    return [pc.sum(table[name], min_count=0).as_py() for name in columns]
