"""The bundled teacher: small, read by transformers alike, and with room to gain from samples."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import retort
from retort.data import problems
from retort.data.chat import ask, load_tokenizer, prompt_ids
from retort.recipe import BUNDLED_TEACHER, PAPER_PROMPT, Arithmetic


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED_TEACHER.iterdir()) <= 5_000_000
    assert 300_000 <= retort.load(BUNDLED_TEACHER).size <= 3_000_000


def test_transformers_reads_it_alike() -> None:
    theirs = AutoModelForCausalLM.from_pretrained(BUNDLED_TEACHER).eval()
    tokenizer = load_tokenizer(BUNDLED_TEACHER)
    ids_BT = torch.tensor([prompt_ids(tokenizer, ask(PAPER_PROMPT, "1. Ada has 12 pens."))])
    with torch.no_grad():
        torch.testing.assert_close(
            retort.load(BUNDLED_TEACHER)(ids_BT), theirs(ids_BT).logits, atol=1e-4, rtol=1e-5
        )


def test_more_samples_have_room_to_help() -> None:
    """At the demo's difficulty it is right on some completions, and its chains are worth timing."""
    asked = problems.load(Arithmetic(kind="arithmetic", count=25, difficulty=(2, 4)))
    tokenizer = load_tokenizer(BUNDLED_TEACHER)
    prompts = [prompt_ids(tokenizer, ask(PAPER_PROMPT, problem.question)) for problem in asked]
    engine = retort.Engine(retort.load(BUNDLED_TEACHER))
    params = retort.SamplingParams(n=4, max_tokens=300, temperature=0.8)
    found = engine.generate(prompts, params)
    right, lengths = [], []
    for problem, completions in zip(asked, found, strict=True):
        for completion in completions:
            text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            answer = retort.grade.extract(text)
            right.append(answer is not None and retort.grade.equivalent(problem.answer, answer))
            lengths.append(len(completion.token_ids))
    assert sum(right) / len(right) == pytest.approx(0.6, abs=0.2)
    assert min(lengths) >= 80
    assert max(lengths) <= 250
