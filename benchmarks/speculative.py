"""What a verification of several tokens costs beside a step of one, and when it pays.

    python benchmarks/speculative.py benchmarks/results/speculative-cpu.json \\
        --pair bundled runs/demo/models/pure

First costs: random weights, float32, every row behind 128 tokens; the draft is an
attention model of two layers and half the width. Step, draft and verification alternate, so that a
busy machine slows all of them. `breaks_even` is the mean number of accepted proposals from which a
round (draft and verification) is cheaper than the steps that would give as many tokens; where it is
above `tokens`, that is never.

Then whole runs, of every `--pair` of a model and a draft that have learnt the same task: how many
proposals are accepted, and the tokens a second of plain decoding and of rounds, in turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

import retort
from retort.data import problems as sets
from retort.data.chat import ask, load_tokenizer, prompt_ids
from retort.model import weights
from retort.model.ahead import read_ahead
from retort.model.config import ATTENTION
from retort.model.decoder import Decoder
from retort.model.geometries import geometry
from retort.model.state import DecoderState
from retort.recipe import BUNDLED_TEACHER, SampleRecipe, load
from retort.sample.engine import Engine
from retort.sample.forward import open_forward
from retort.sample.proposals import Proposals, Streams, judge, propose, read
from retort.sample.speculative import Speculative, for_few_rows
from retort.sample.tokens import SamplingParams, draw, uniforms

MODELS = ("small", "small-pure", "small-hybrid")
BATCHES = (1, 8, 64)
TOKENS = (2, 4, 8)
CONTEXT = 128
PARAMS = SamplingParams()
SAMPLES = 4
"""Of each question; and so many questions that every slot is filled twice."""
SAMPLED_REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """Milliseconds, medians, and what follows from them."""

    model: str
    batch: int
    tokens: int
    step: float
    verification: float
    draft: float
    breaks_even: float


@dataclass(frozen=True)
class Sampled:
    """Decoding by a model alone and with a draft, tokens a second of decoding, medians."""

    model: str
    draft: str
    slots: int
    tokens: int
    accepted: float
    plain: float
    speculative: float


class Rounds:
    """What is measured, on rows that have all read `CONTEXT` tokens."""

    def __init__(self, model: Decoder, draft: Decoder, batch: int, tokens: int, steps: int) -> None:
        self.tokens = tokens
        self.zeros_B = torch.zeros(batch, dtype=torch.long)
        self.streams = Streams(torch.arange(batch), self.zeros_B)
        room = CONTEXT + tokens + 1 + steps
        self.state, self.draft_state = (begun(each, batch, room) for each in (model, draft))
        states = self.state.nbytes + self.draft_state.nbytes
        self.reader, self.proposer = for_few_rows([model, draft], states)
        self.forward, self.reach = open_forward(model, batch, room), CONTEXT
        self.forward.admit(torch.arange(batch), self.state.select([0]))
        self.proposals: Proposals | None = None

    def step(self) -> None:
        """A token for every row, as plain decoding makes it."""
        self.reach += 1
        logits_BV = self.forward.step(self.zeros_B, self.reach)
        draw(logits_BV, uniforms(self.streams.seed_S, self.zeros_B), PARAMS)

    def drafting(self) -> None:
        """Proposals, after what was accepted has been read: another number for every row."""
        state = again(self.draft_state)
        unread = [[1] * (1 + row % (self.tokens + 1)) for row in range(len(self.zeros_B))]
        logits_BV = read(self.proposer, state, unread)
        self.proposals = propose(self.proposer, state, logits_BV, self.streams, self.tokens, PARAMS)

    def verification(self) -> None:
        """What becomes of the proposals."""
        assert self.proposals is not None
        ids_BT = torch.cat([self.zeros_B[:, None], self.proposals.token_SK], dim=1)
        logits_BTV, ahead = read_ahead(self.reader, ids_BT, again(self.state))
        _, accepted_B = judge(logits_BTV, self.proposals, self.streams, PARAMS)
        ahead.keep(accepted_B + 1)


def begun(decoder: Decoder, batch: int, room: int) -> DecoderState:
    """A state of rows that have read the same tokens."""
    state = decoder.init_state(1, room)
    decoder(torch.randint(decoder.config.vocab_size, (1, CONTEXT)), state)
    return state.fork(batch)


def again(state: DecoderState) -> DecoderState:
    """The state, its rows as long as at first."""
    state.length_B.fill_(CONTEXT)
    return state.first(state.batch, CONTEXT)


def random_model(name: str, small: bool = False) -> Decoder:
    """A model of a geometry's size, or a draft for it."""
    config = geometry(name)
    if small:
        kinds, width = (ATTENTION,) * 2, config.hidden_size // 2
        config = replace(
            config, layer_types=kinds, hidden_size=width, intermediate_size=3 * width, mixer=None
        )
    decoder = Decoder(config)
    decoder.reset_parameters()
    if not name.startswith("small"):
        decoder.bfloat16().float()  # as published weights are
    return decoder.eval().requires_grad_(False)


def measure(name: str, batch: int, tokens: int, repeats: int) -> Cost:
    """A step, a draft and a verification, in turn."""
    torch.manual_seed(0)
    models = random_model(name), random_model(name, small=True)
    with torch.inference_mode():
        return _measured(models, name, batch, tokens, repeats)


def _measured(
    models: tuple[Decoder, Decoder], name: str, batch: int, tokens: int, repeats: int
) -> Cost:
    rounds = Rounds(*models, batch, tokens, repeats + 2)
    kinds = rounds.step, rounds.drafting, rounds.verification
    for _ in range(2):
        for kind in kinds:
            kind()
    times = [[milliseconds(kind) for kind in kinds] for _ in range(repeats)]
    step, draft, verified = (statistics.median(column) for column in zip(*times, strict=True))
    return Cost(name, batch, tokens, step, verified, draft, (draft + verified) / step - 1)


def sampled(model: str, draft: str, slots: int, tokens: int, repeats: int) -> Sampled:
    """Both ways of answering some word problems, in turn."""
    folders = [BUNDLED_TEACHER if name == "bundled" else Path(name) for name in (model, draft)]
    decoder, proposer = (weights.load(folder, torch.float32, "cpu") for folder in folders)
    tokenizer = load_tokenizer(folders[0])
    count = max(1, 2 * slots // SAMPLES)
    asked = [f"problems.count={count}", "problems.seed=777", f"model={model}", "out=none"]
    recipe = load(SampleRecipe, ["demo/sample.yaml", *asked])
    problems = (ask(recipe.prompt, problem.question) for problem in sets.load(recipe.problems))
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    params = SamplingParams(n=SAMPLES, max_tokens=300, temperature=0.8)
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        engines = Engine(decoder, slots), Speculative(decoder, proposer, tokens, slots)
        for engine, found in zip(engines, rates, strict=True):
            engine.generate(prompts, params)
            found.append(engine.timing.decode_tokens / engine.timing.decode_seconds)
    plain, speculative = (statistics.median(found[1:]) for found in rates)  # the first warms up
    names = (Path(name).name for name in (model, draft))
    return Sampled(*names, slots, tokens, engines[1].timing.acceptance, plain, speculative)


def milliseconds(work: Callable[[], None]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Measures, shows and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", nargs="+", default=MODELS, help="names of sizes")
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--pair", nargs=2, metavar=("MODEL", "DRAFT"), action="append", default=[], help="folders"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    costs = []
    for name in options.model:
        for batch in options.batch:
            for tokens in TOKENS:
                costs.append(measure(name, batch, tokens, options.repeats))
                print(json.dumps(asdict(costs[-1])), flush=True)
    runs = []
    for (model, draft), slots, tokens in product(options.pair, options.batch, TOKENS):
        runs.append(sampled(model, draft, slots, tokens, SAMPLED_REPEATS))
        print(json.dumps(asdict(runs[-1])), flush=True)
    about = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "retort": retort.__version__,
        "threads": options.threads,
        "context": CONTEXT,
        "repeats": options.repeats,
        "unit": "milliseconds, and tokens a second; medians",
    }
    found = {"costs": [asdict(cost) for cost in costs], "sampled": [asdict(run) for run in runs]}
    text = json.dumps(about | found, indent=2)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
