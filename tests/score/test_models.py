"""Scores of all kinds of reward models against scorers that read one prefix at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Model,
)

from retort.data.chat import PINNED_DATE
from retort.recipe import ScoreRecipe
from retort.score.loading import open_model
from retort.score.models import RewardModel

from .conftest import QUESTIONS, TEMPLATE, TEXTS, Make

QUESTION = QUESTIONS["a"]
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
STEPS = [
    ["Add them: 2 + 3 = 5.", "The final answer is 5."],
    ["The final answer is 6."],
    [
        "First 2 + 1.",
        "Then + - + 3 apples, <extra_0> says Ben.",
        "So 6.",
        "The final answer is 6.",
    ],
]


def opened(folder: Path, kind: str, **settings: Any) -> RewardModel:
    return open_model(ScoreRecipe(run=Path("unused"), model=folder, kind=kind, **settings))


def judged(model: RewardModel, texts: list[str]) -> list[list[float]]:
    return model.scores([model.read(QUESTION, text) for text in texts])


def written(tokenizer: PreTrainedTokenizerFast, turns: list[str], **options: Any) -> str:
    """A conversation; user and assistant take turns."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": r, "content": text} for r, text in zip(roles, turns, strict=False)]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, date_string=PINNED_DATE, **options
    )


def last(module: Any, tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """What a model says behind a text, which it reads alone."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        output = module(ids)
    return output.logits[0, -1] if "logits" in output else output.last_hidden_state[0, -1]


def naive_plus_minus(
    folder: Path, tokenizer: PreTrainedTokenizerFast, steps: list[str]
) -> list[float]:
    module = LlamaForCausalLM.from_pretrained(folder)
    signs = [tokenizer.encode(sign)[0] for sign in "+-"]
    scores, turns = [], []
    for k, step in enumerate(steps):
        turns.append(f"{QUESTION} {step}" if k == 0 else step)
        prefix = written(tokenizer, turns, add_generation_prompt=True)
        scores.append(last(module, tokenizer, prefix)[signs].softmax(0)[0].item())
        turns.append("+")
    return scores


def naive_step_ends(
    folder: Path, tokenizer: PreTrainedTokenizerFast, steps: list[str]
) -> list[float]:
    head = load_file(folder / "model.safetensors")
    module = Qwen2Model.from_pretrained(folder)
    prefix = f"<|user|>Today is {PINNED_DATE}<|end|><|system|>\n\n{SYSTEM}<|end|>"
    prefix += f"<|user|>\n\n{QUESTION}<|end|><|assistant|>\n\n"
    scores = []
    for step in steps:
        prefix += step + "<extra_0>"
        hidden = last(module, tokenizer, prefix)
        inner = (head["score.0.weight"] @ hidden + head["score.0.bias"]).relu()
        logits = head["score.2.weight"] @ inner + head["score.2.bias"]
        scores.append(logits.softmax(0)[1].item())
    return scores


def test_plus_minus_in_one_pass(make_model: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = make_model("rlhflow")
    naive = [naive_plus_minus(folder, tokenizer, steps) for steps in STEPS]
    found = judged(opened(folder, "rlhflow"), TEXTS[:3])
    for ours, theirs in zip(found, naive, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)
    assert len({round(score, 3) for scores in found for score in scores}) > 5, "scores must differ"


def test_qwen_without_its_own_code(make_model: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = make_model("qwen")
    naive = [naive_step_ends(folder, tokenizer, steps) for steps in STEPS]
    found = judged(opened(folder, "qwen"), TEXTS[:3])
    for ours, theirs in zip(found, naive, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)
    assert len({round(score, 3) for scores in found for score in scores}) > 5, "scores must differ"


# With padding of its own, and with one that ends every conversation, and without any.
@pytest.mark.parametrize("pad", [None, "<|pad|>", "<|end|>"])
def test_outcome(make_model: Make, tokenizer: PreTrainedTokenizerFast, pad: str | None) -> None:
    id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    folder = make_model("outcome", pad_token_id=id)
    module = LlamaForSequenceClassification.from_pretrained(folder)
    naive = []
    for text in TEXTS:
        ids = tokenizer.encode(written(tokenizer, [QUESTION, text]), add_special_tokens=False)
        with torch.no_grad():
            naive.append(module(torch.tensor([ids])).logits[0].tolist())
    model = opened(folder, "outcome")
    for _ in range(2):  # what is set for one batch must not change the next
        for ours, theirs in zip(judged(model, TEXTS), naive, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-6)


def test_outcome_of_an_encoder(make_model: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = make_model("encoder")
    # In float64: float32 rounds up to 2.4e-6 away from it, by the CPU and by what is padded.
    module = BertForSequenceClassification.from_pretrained(folder).double()
    exact = []
    for text in TEXTS:
        ids = tokenizer.encode(written(tokenizer, [QUESTION, text]), add_special_tokens=False)
        with torch.no_grad():
            exact.append(module(torch.tensor([ids])).logits[0].tolist())
    for ours, theirs in zip(judged(opened(folder, "outcome"), TEXTS), exact, strict=True):
        assert ours == pytest.approx(theirs, abs=5e-6)


def test_outcome_without_a_chat_template(make_model: Make) -> None:
    folder = make_model("outcome")
    (folder / "chat_template.jinja").unlink()
    model = opened(folder, "outcome")
    assert model.read("2 + 3?", " 5").ids == model.read("2 + 3? 5", "").ids
    assert len(judged(model, TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("kind", ["rlhflow", "qwen"])
def test_text_without_steps(make_model: Make, kind: str) -> None:
    model = opened(make_model(kind), kind)
    assert model.read(QUESTION, " \n\n \n").at == []


@pytest.mark.parametrize("kind", ["rlhflow", "qwen", "outcome"])
def test_half_precision(make_model: Make, kind: str) -> None:
    folder = make_model(kind)
    half = judged(opened(folder, kind, dtype="bfloat16"), TEXTS[:3])
    full = judged(opened(folder, kind), TEXTS[:3])
    assert half != full
    for ours, theirs in zip(half, full, strict=True):
        assert ours == pytest.approx(theirs, abs=0.3)


def test_limit_is_the_models(make_model: Make) -> None:
    assert opened(make_model("rlhflow"), "rlhflow").limit == 160


# Folders that do not fit.


@pytest.mark.parametrize(
    ("kind", "wanted", "has"),
    [
        ("outcome", "rlhflow", "ForCausalLM.*, and this folder has LlamaForSequenceClassification"),
        ("rlhflow", "qwen", "ForProcessRewardModel.*, and this folder has LlamaForCausalLM"),
        ("rlhflow", "outcome", "ForSequenceClassification.*, and this folder has LlamaForCausalLM"),
        ("qwen", "rlhflow", "and this folder has Qwen2ForProcessRewardModel"),
    ],
)
def test_model_of_another_kind(make_model: Make, kind: str, wanted: str, has: str) -> None:
    with pytest.raises(ValueError, match=has):
        opened(make_model(kind), wanted)


def test_classifier_of_several_labels(make_model: Make) -> None:
    with pytest.raises(ValueError, match="has 3 labels, an outcome model has one"):
        opened(make_model("outcome", num_labels=3), "outcome")


@pytest.mark.parametrize(("kind", "lost"), [("rlhflow", "lm_head"), ("qwen", "score.2.bias")])
def test_missing_weights(make_model: Make, kind: str, lost: str) -> None:
    folder = make_model(kind)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if not name.startswith(lost)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is no model of kind={kind}, it has no {lost}"):
        opened(folder, kind)


def test_pickled_weights_are_not_read(make_model: Make) -> None:
    folder = make_model("rlhflow")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        opened(folder, "rlhflow")


def test_tokenizer_without_the_marker(make_model: Make) -> None:
    folder = make_model("qwen")
    vocabulary = (folder / "tokenizer.json").read_text().replace("extra_0", "other_0")
    (folder / "tokenizer.json").write_text(vocabulary)
    settings = (folder / "tokenizer_config.json").read_text().replace("extra_0", "other_0")
    (folder / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match="no token for '<extra_0>'"):
        opened(folder, "qwen")


def test_template_that_rewrites_the_answer(make_model: Make) -> None:
    folder = make_model("rlhflow")
    rewriting = TEMPLATE.replace("| trim", "| trim | replace('+', 'good')")
    (folder / "chat_template.jinja").write_text(rewriting)
    with pytest.raises(ValueError, match="its chat template"):
        opened(folder, "rlhflow").read(QUESTION, TEXTS[0])


def test_template_that_counts_turns(make_model: Make) -> None:
    folder = make_model("rlhflow")
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace("'|>", "loop.length | string + '|>")
    )
    with pytest.raises(ValueError, match="writes a turn differently where others came before"):
        opened(folder, "rlhflow").read(QUESTION, "\n\n".join("abcdefgh"))


@pytest.mark.parametrize("kind", ["rlhflow", "qwen"])
def test_process_model_without_a_chat_template(make_model: Make, kind: str) -> None:
    folder = make_model(kind)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=f"{kind}: its chat template"):
        opened(folder, kind).read(QUESTION, TEXTS[0])
