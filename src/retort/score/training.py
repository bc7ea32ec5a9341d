"""Training a verifier, and how far its scores can be believed on problems it has not seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from retort import console
from retort.console import Advance
from retort.data.chat import load_tokenizer
from retort.model import weights
from retort.model.decoder import Decoder
from retort.model.devices import fast_dtype, open_device
from retort.recipe import Rollouts, Sampling, VerifierRecipe
from retort.report.reliability import Bin, calibration_error, ranking, reliability
from retort.sample.engine import Engine
from retort.sample.tokens import SamplingParams
from retort.score.batches import batches
from retort.score.examples import Example, first_texts, graded, split_by_problem
from retort.score.features import features, parts
from retort.score.head import Examples, Head, fit_head
from retort.score.reading import continuation
from retort.score.rollouts import prefixes, values
from retort.score.verifier import Settings
from retort.store import Run
from retort.tables import write_aside

REPORT = "reliability.json"


@dataclass(frozen=True)
class Reliability:
    """What a verifier is worth on problems that were held out of its training.

    `texts` and `positions` are those it was made of in all. `ranking` is the probability that
    something right scores above something wrong, `error` the expected calibration error, and
    `uncalibrated` what that was before calibration; `bins` are the reliability diagram.
    """

    problems: int
    texts: int
    positions: int
    held_out_problems: int
    right: float
    ranking: float
    error: float
    uncalibrated: float
    bins: list[Bin]


def train_verifier(recipe: VerifierRecipe) -> Reliability:
    """Trains a verifier and writes its folder: the student, the head, and `reliability.json`.

    Memory holds the features of every different text. Raises ValueError, before anything is
    written, when the run is not graded, its problems are too few or all or none of its answers
    are right, or the folder cannot be written to.
    """
    weights.check_target(recipe.out)
    run = Run.open(recipe.run)
    if run.manifest["recipe"].get("shots"):
        raise ValueError(
            f"{run.folder} was sampled with shots, which a verifier does not read; train it on a "
            "run without them"
        )
    settings = Settings(run.manifest["recipe"]["prompt"], every_step=recipe.rollouts is not None)
    device = open_device(recipe.device)
    tokenizer = load_tokenizer(recipe.model)
    decoder = weights.load(recipe.model, fast_dtype(device), device)
    rollouts = recipe.rollouts
    examples = _examples(run, tokenizer, settings, rollouts.completions if rollouts else None)
    if rollouts is not None:
        examples = _with_rollouts(run, decoder, tokenizer, examples, recipe.seed, rollouts)
    found = split_by_problem(examples, recipe.seed)
    with console.progress("read completions", len(examples)) as advance:
        fit, calibrate, held_out = (
            _features(decoder, each, recipe.batch_tokens, advance) for each in found
        )
    _check_both(run, [fit, calibrate, held_out])
    raw, head = fit_head(fit, calibrate, parts(decoder))
    report = _report(found, held_out, raw, head)
    weights.save(decoder, recipe.out, tokenizer)
    head.save(recipe.out)
    write_aside(recipe.out / REPORT, json.dumps(asdict(report), indent=2).encode())
    settings.save(recipe.out)  # last: with it the folder is a verifier's
    return report


def _examples(
    run: Run, tokenizer: PreTrainedTokenizerBase, settings: Settings, most: int | None
) -> list[Example]:
    """Each different text with steps in it, and whether its answer is right; of each problem at
    most so many.
    """
    texts = graded(run)
    questions = _column(run, "question")
    examples = []
    for text in list(texts) if most is None else first_texts(list(texts), most):
        count, right = texts[text]
        found = continuation(
            tokenizer, settings.prompt, questions[text[0]], text[1], settings.every_step
        )
        if found.at:
            examples.append(Example(text[0], found, [float(right)] * len(found.at), count))
    return examples


def _with_rollouts(
    run: Run,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    seed: int,
    settings: Rollouts,
) -> list[Example]:
    """The same with labels for steps: that of the last is the verdict, of others what roll-outs
    from there come to.
    """
    starts = {
        prefix: each.reading.start
        for each in examples
        for prefix in prefixes(each.problem_id, each.reading)[:-1]
    }
    sampling = Sampling(**run.manifest["recipe"]["sampling"])
    params = SamplingParams(**sampling.model_dump() | {"seed": seed, "n": settings.n})
    engine = Engine(decoder, settings.slots, partial(_text, tokenizer))
    found = values(engine, tokenizer, starts, _column(run, "answer"), params)
    return [
        replace(
            each,
            labels=[found[prefix] for prefix in prefixes(each.problem_id, each.reading)[:-1]]
            + each.labels[-1:],
        )
        for each in examples
    ]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _features(
    decoder: Decoder, examples: Sequence[Example], tokens: int, advance: Advance
) -> Examples:
    """Features of all positions of the examples, with labels and weights."""
    lengths = [(each, len(each.reading.ids)) for each in examples]
    order: list[Example] = []
    found = [torch.empty(0, sum(parts(decoder)))]
    for batch in batches(lengths, tokens):
        found.append(features(decoder, [each.reading for each in batch]).cpu())
        order += batch
        advance(len(batch))
    label_N = torch.tensor([label for each in order for label in each.labels])
    weight_N = torch.tensor([float(each.weight) for each in order for _ in each.labels])
    return Examples(torch.cat(found), label_N, weight_N)


def _check_both(run: Run, sets: Sequence[Examples]) -> None:
    """Raises ValueError where one of the sets can teach or show nothing."""
    if any(each.one_sided for each in sets):
        raise ValueError(
            f"{run.folder}: right and wrong answers are needed among the problems to fit with, to "
            "calibrate with and to hold out, and one of these has only one kind; sample more "
            "problems, or ones that are neither too easy nor too hard "
            "(docs/scoring.md#a-verifier-of-ones-own)"
        )


def _report(
    found: Sequence[Sequence[Example]], held_out: Examples, raw: Head, head: Head
) -> Reliability:
    score_N, before_N = (
        each.logits(held_out.x_NF).sigmoid().double().numpy() for each in (head, raw)
    )
    y_N, weight_N = held_out.y_N.double().numpy(), held_out.weight_N.double().numpy()
    examples = [example for part in found for example in part]
    bins = reliability(score_N, y_N, weight_N)
    return Reliability(
        problems=len({each.problem_id for each in examples}),
        texts=len(examples),
        positions=sum(len(each.labels) for each in examples),
        held_out_problems=len({each.problem_id for each in found[2]}),
        right=((y_N * weight_N).sum() / weight_N.sum()).item(),
        ranking=ranking(score_N, y_N, weight_N),
        error=calibration_error(bins),
        uncalibrated=calibration_error(reliability(before_N, y_N, weight_N)),
        bins=bins,
    )


def reliability_table(found: Reliability) -> Table:
    """The reliability diagram in numbers."""
    table = Table(title=f"{found.held_out_problems} problems held out")
    for name in ("score", "completions", "mean score", "right"):
        table.add_column(name, justify="right")
    for each in found.bins:
        bounds = f"{each.low:.1f} to {each.high:.1f}"
        table.add_row(bounds, f"{each.count:.0f}", f"{each.score:.3f}", f"{each.right:.3f}")
    return table


def in_words(found: Reliability) -> str:
    """What the figures come to, in a line."""
    return (
        f"on problems held out, {found.ranking:.1%} of pairs ranked right above wrong; calibration "
        f"error {found.error:.3f}, {found.uncalibrated:.3f} before calibration"
    )


def _column(run: Run, name: str) -> dict[str, str]:
    """A column of the run's problems by their ids."""
    ids, values = (each.to_pylist() for each in run.problems.read(["problem_id", name]).columns)
    return dict(zip(ids, values, strict=True))
