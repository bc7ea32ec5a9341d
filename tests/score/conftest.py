"""Tiny reward models of every kind, made here, and a run whose completions they judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
)

from retort.data.chat import train_tokenizer
from retort.store import Run

QUESTIONS = {"a": "How many apples do 2 and 3 make?", "b": "And 4 pears, 1 of them eaten?"}
TEXTS = [
    "Add them: 2 + 3 = 5.\n\nThe final answer is 5.",
    "The final answer is 6.",
    "First 2 + 1.\n\n\nThen + - + 3 apples, <extra_0> says Ben.\n \nSo 6.\n\n"
    "The final answer is 6.",
    "",
    "Add them: 2 + 3 = 5.\n\nThe final answer is 5.",
    " ".join(["apples and pears"] * 12) + "\n\nThe final answer is 5.",
]

# Like Llama's: contents are trimmed, two line feeds come before an answer, and there is a date.
TEMPLATE = (
    "{{ '<|user|>Today is ' + date_string + '<|end|>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n\n' + message.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer([*QUESTIONS.values(), *TEXTS, "<|system|> Today is"] * 3, 400)
    made.chat_template = TEMPLATE
    made.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    return made


Make = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """The folder of a reward model of a kind, with random weights that spread its scores."""

    def make(kind: str, name: str = "", seed: int = 0, **changes: Any) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path / (name or kind)
        sizes = SIZES | {"vocab_size": len(tokenizer)} | changes
        MAKERS[kind](sizes, folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def _causal(sizes: dict[str, Any], folder: Path) -> None:
    _spread(LlamaForCausalLM(LlamaConfig(**sizes))).save_pretrained(folder)


def _classifier(sizes: dict[str, Any], folder: Path) -> None:
    config = LlamaConfig(**{"num_labels": 1, "pad_token_id": None} | sizes)
    _spread(LlamaForSequenceClassification(config)).save_pretrained(folder)


def _published(sizes: dict[str, Any], folder: Path) -> None:
    """As the published folders are: code of their own, and tensors of a head behind `model.`"""
    config = Qwen2Config(**sizes)
    config.architectures = ["Qwen2ForProcessRewardModel"]
    config.auto_map = {"AutoModel": "code.Qwen2ForProcessRewardModel", "AutoConfig": "code.Config"}
    config.save_pretrained(folder)
    (folder / "code.py").write_text("raise SystemExit('code of a checkpoint was run')")
    width = sizes["hidden_size"]
    backbone = _spread(Qwen2Model(config)).state_dict()
    tensors = {f"model.{name}": each for name, each in backbone.items()}
    tensors |= {
        "lm_head.weight": torch.randn(sizes["vocab_size"], width),
        "score.0.weight": torch.randn(width, width) / 4,
        "score.0.bias": torch.randn(width),
        "score.2.weight": torch.randn(2, width) / 4,
        "score.2.bias": torch.randn(2),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _encoder(sizes: dict[str, Any], folder: Path) -> None:
    config = BertConfig(**sizes, num_labels=1)
    _spread(BertForSequenceClassification(config)).save_pretrained(folder)


MAKERS = {"rlhflow": _causal, "outcome": _classifier, "encoder": _encoder, "qwen": _published}


@torch.no_grad()
def _spread(module: PreTrainedModel) -> Any:
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two problems, six completions each, of which two are the same and one is empty."""
    made = Run.start(tmp_path / "run", {"model": "m"}, {"name": "m", "n": len(TEXTS)})
    made.problems.append(
        [{"problem_id": id, "question": text, "answer": "5"} for id, text in QUESTIONS.items()]
    )
    for id in QUESTIONS:
        complete(made, id, TEXTS)
    return made


def complete(run: Run, problem_id: str, texts: list[str], start: int = 0) -> None:
    run.completions.append(
        [
            {
                "problem_id": problem_id,
                "sample_idx": start + i,
                "seed": 0,
                "text": text,
                "token_count": 5,
                "finish_reason": "stop",
                "prompt_tokens": 7,
                "logprob": -1.0,
                "batch": 0,
                "started": 0.0,
                "ended": 1.0,
            }
            for i, text in enumerate(texts)
        ]
    )
