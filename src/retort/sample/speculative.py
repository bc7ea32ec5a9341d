"""Speculative decoding: a small draft proposes, the model verifies several tokens at a time.

Each round of a row gives the proposals that the model accepts, and one token more. A state-space
layer verifies from its last verified state and keeps its inputs, not its states, so that dropping
proposals costs no pass of its own (arXiv 2408.15237, section 4).

Shapes: S rows, K proposals, T = K + 1, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retort.data.chat import load_tokenizer
from retort.model import weights
from retort.model.ahead import read_ahead
from retort.model.decoder import Decoder
from retort.sample.clock import Timing
from retort.sample.cpu_products import with_panels
from retort.sample.engine import Completion, Decode, Engine, Finished, Reason
from retort.sample.memory import panel_bytes
from retort.sample.proposals import Proposals, Streams, judge, propose, read
from retort.sample.queue import Prompts, Queue, fill
from retort.sample.stopping import StopStrings
from retort.sample.tokens import SamplingParams, draw, log_probability, uniforms


class Speculative(Engine):
    """An engine whose model verifies what `draft` proposes, `tokens` at a time.

    What it samples has the same distribution as the model's own, and is the same where it is
    greedy, up to ties in floating point. Raises ValueError when the two models cannot share tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        draft: Decoder,
        tokens: int = 4,
        slots: int = 64,
        decode: Decode | None = None,
    ) -> None:
        super().__init__(decoder, slots, decode)
        if tokens < 1:
            raise ValueError(f"draft tokens = {tokens}: at least one is to be proposed")
        ours, theirs = decoder.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the draft has a vocabulary of {theirs} tokens and the model one of {ours}; "
                "a draft must share its model's tokenizer"
            )
        self.draft, self.tokens = draft, tokens

    def _run(self, left: Queue, params: SamplingParams) -> Iterator[list[Finished]]:
        return _Rounds(self, left, params).run()


def load_draft(
    folder: Path, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Decoder:
    """A draft for a decoder, on its device. Raises ValueError unless their tokenizers agree."""
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    if ours != theirs:
        differing = sum(theirs.get(token) != index for token, index in ours.items())
        raise ValueError(
            f"{folder}: its tokenizer differs from the model's in {differing} of {len(ours)} "
            "tokens; a draft must share its model's tokenizer"
        )
    return weights.load(folder, dtype, str(decoder.device))


@dataclass
class _Row:
    """A running completion. The draft has not read `unread` yet, nor the model the last of it."""

    request: int
    sample: int
    seed: int
    prompt: int
    started: float = field(default_factory=time.time)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    reason: Reason | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the completion."""
        return self.prompt + len(self.tokens)


def for_few_rows(decoders: Sequence[Decoder], states: float) -> list[Decoder]:
    """The decoders as they are fastest with few tokens a row, beside states of so many bytes; those
    of prompts are many.
    """
    found, taken = [], states
    for decoder in decoders:
        copied = panel_bytes(decoder, taken)
        found.append(with_panels(decoder, torch.get_num_threads()) if copied else decoder)
        taken += copied
    return found


class _Rounds:
    """The running rows, and what is still to come."""

    def __init__(self, engine: Speculative, left: Queue, params: SamplingParams) -> None:
        self.engine, self.params = engine, params
        self.prompts = Prompts(left, [engine.decoder, engine.draft])
        self.stops = engine.stops(params)
        self.strings = StopStrings.of(params, engine.decode)
        self.running: list[_Row] = []
        # A row that lacks one token still has that many proposals verified.
        longest = self.prompts.longest + params.max_tokens - 1 + engine.tokens
        shape = min(engine.slots, len(left)), longest
        self.state = engine.decoder.init_state(*shape)
        self.draft_state = engine.draft.init_state(*shape)
        states = self.state.nbytes + self.draft_state.nbytes
        self.decoder, self.draft = for_few_rows([engine.decoder, engine.draft], states)

    def run(self) -> Iterator[list[Finished]]:
        """What has finished whenever that is looked at, often nothing, until none is left."""
        while self.running or self.prompts:
            while self._room() > 0 and self.prompts:
                yield self._admit()
            if self.running:
                yield self._round()

    # ------------------------------------------------------------ admitting

    @torch.inference_mode()
    def _admit(self) -> list[Finished]:
        """Starts as many samples of the next prompt as fit; returns what already finished."""
        before = self.prompts.timing
        start = self.prompts.start(self._room())
        self.engine.timing += self.prompts.timing - before
        began, first, count = time.perf_counter(), len(self.running), len(start.samples)
        prompt, draft = start.prompts
        slot_S = torch.arange(first, first + count, device=self.decoder.device)
        self.state.put(slot_S, prompt.state)
        self.draft_state.put(slot_S, draft.state)
        length = self.prompts.left.length(start.request)
        told = zip(start.samples, start.seeds, strict=True)
        rows = [_Row(start.request, sample, seed, length) for sample, seed in told]
        logits_SV = prompt.logits_1V.expand(count, -1)
        seed_S = torch.tensor(start.seeds, device=self.decoder.device)
        token_S = draw(logits_SV, uniforms(seed_S, torch.zeros_like(seed_S)), self.params)
        self.running += rows
        tokens = self._write(rows, token_S[:, None], [1] * count, logits_SV[:, None])
        done = self._retire()
        seconds = self._clock(began, tokens, steps=0)
        self.engine.timing += Timing(starts=count, start_seconds=seconds)
        return done

    def _room(self) -> int:
        return self.state.batch - len(self.running)

    # ------------------------------------------------------------ rounds

    @torch.inference_mode()
    def _round(self) -> list[Finished]:
        """Proposes for every running row, and verifies; returns the completions that finished."""
        began = time.perf_counter()
        rows, device = list(self.running), self.decoder.device
        context = sum(row.length for row in rows)
        streams = Streams(
            torch.tensor([row.seed for row in rows], device=device),
            torch.tensor([len(row.tokens) for row in rows], device=device),
        )
        proposals = self._propose(streams)
        last_S1 = torch.tensor([row.tokens[-1:] for row in rows], device=device)
        state = self.state.first(len(rows), max(row.length for row in rows) - 1)
        ids_ST = torch.cat([last_S1, proposals.token_SK], dim=1)
        logits_STV, ahead = read_ahead(self.decoder, ids_ST, state)
        token_ST, accepted_S = judge(logits_STV, proposals, streams, self.params)
        # The token behind the accepted ones has been drawn, not read.
        ahead.keep(accepted_S + 1)
        counts = [accepted + 1 for accepted in accepted_S.tolist()]
        tokens = self._write(rows, token_ST, counts, logits_STV)
        self.engine.timing += Timing(verifications=len(rows), accepted=sum(counts) - len(rows))
        done = self._retire()
        self.engine.log.add(len(rows), context, 1, self._clock(began, tokens, steps=1))
        return done

    def _propose(self, streams: Streams) -> Proposals:
        """What the draft proposes, after it has read what it did not know of."""
        rows = self.running
        state = self.draft_state.first(len(rows), max(row.length - len(row.unread) for row in rows))
        logits_SV = read(self.draft, state, [row.unread for row in rows])
        state.reach = max(row.length for row in rows)  # without the padding
        return propose(self.draft, state, logits_SV, streams, self.engine.tokens, self.params)

    def _write(
        self, rows: list[_Row], token_ST: Tensor, counts: list[int], logits_STV: Tensor
    ) -> int:
        """Writes down the first tokens of each row, as many as `counts` says or up to its end;
        returns how many that were.
        """
        logprob_ST = log_probability(logits_STV.flatten(0, 1), token_ST.flatten())
        told = zip(
            rows, token_ST.tolist(), logprob_ST.view(token_ST.shape).tolist(), counts, strict=True
        )
        before = sum(len(row.tokens) for row in rows)
        for row, tokens, logprobs, count in told:
            row.unread = tokens[:count]
            row.tokens += row.unread
            row.logprobs += logprobs[:count]
            self._end(row, len(row.tokens) - count)
        return sum(len(row.tokens) for row in rows) - before

    def _end(self, row: _Row, known: int) -> None:
        """Cuts a row where it ends, if it does so behind its first `known` tokens."""
        fresh = range(known, len(row.tokens))
        stop = next((i + 1 for i in fresh if row.tokens[i] in self.stops), None)
        end = min(self.params.max_tokens, stop or len(row.tokens))
        if self.strings.strings:
            string = self.strings.end(row.tokens[:end], known)
            stop, end = (stop, end) if string is None else (string, string)
        if stop == end:
            row.reason = "stop"
        elif end == self.params.max_tokens:
            row.reason = "length"
        del row.tokens[end:], row.logprobs[end:]

    # ------------------------------------------------------------ finishing

    def _retire(self) -> list[Finished]:
        """Takes finished rows out, moving the rows behind them into their place."""
        now = time.time()
        done = [
            Finished(row.request, row.sample, self._completion(row, row.reason), row.started, now)
            for row in self.running
            if row.reason is not None
        ]
        finished = {i for i, row in enumerate(self.running) if row.reason is not None}
        gaps, movers = fill(len(self.running), finished)
        if gaps:
            self.state.put(gaps, self.state.select(movers))
            self.draft_state.put(gaps, self.draft_state.select(movers))
        for gap, mover in zip(gaps, movers, strict=True):
            self.running[gap] = self.running[mover]
        del self.running[len(self.running) - len(finished) :]
        return done

    def _completion(self, row: _Row, reason: Reason) -> Completion:
        logprobs = row.logprobs if self.params.logprobs else None
        return Completion(row.tokens, reason, math.fsum(row.logprobs), logprobs)

    def _clock(self, began: float, tokens: int, steps: int) -> float:
        """Adds the tokens that were decoded since `began`, and the time, which it returns."""
        seconds = time.perf_counter() - began
        self.engine.timing += Timing(
            decode_tokens=tokens, decode_steps=steps, decode_seconds=seconds
        )
        return seconds
