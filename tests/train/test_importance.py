"""Which layers matter: what replacing each one costs, who is kept, and what is not done twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retort.data.chat import train_tokenizer
from retort.data.mixture import open_data
from retort.data.packing import Batch, Rows
from retort.model.config import ATTENTION, LINEAR
from retort.model.decoder import Block, Decoder
from retort.model.transplant import mixer_config, replaced_block, transplant
from retort.recipe import KeepImportant
from retort.train import importance

MakeDecoder = Callable[..., Decoder]

TEXTS = [f"Text number {i} says little, but says it {i} times over, or so." for i in range(20)]


def batch(documents: list[list[int]], learnt: float, length: int = 12) -> Batch:
    """Rows of documents of the given lengths, padded; about a part of the tokens are learnt."""
    document_BT = torch.full((len(documents), length), -1)
    for row, lengths in enumerate(documents):
        document_BT[row, : sum(lengths)] = torch.repeat_interleave(torch.tensor(lengths))
    learn_BT = (torch.rand(len(documents), length) < learnt) & (document_BT >= 0)
    return Batch(torch.randint(61, (len(documents), length)), document_BT, learn_BT)


def plain_cost(teacher: Decoder, index: int, block: Block, batches: list[Batch]) -> float:
    """KL(teacher || student) of a whole student in which one layer is replaced, token by token."""
    kinds = [LINEAR if i == index else kind for i, kind in enumerate(teacher.config.layer_types)]
    student = transplant(teacher, kinds, block.mixer.config.kind, state_size=8)
    student.blocks[index].load_state_dict(block.state_dict())
    total, count = 0.0, 0
    for each in batches:
        p, q = (
            decoder(each.ids_BT, document_BT=each.document_BT).detach().double().softmax(-1)
            for decoder in (teacher, student)
        )
        for row, t in each.learn_BT.nonzero().tolist():
            total += float((p[row, t] * (p[row, t] / q[row, t]).log()).sum())
            count += 1
    return total / count


# ---------------------------------------------------------------- the cost of one layer


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2", "mamba1"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_cost_is_the_divergence_of_a_student(
    make_decoder: MakeDecoder, kind: str, index: int
) -> None:
    """A mean over all learnt tokens, of which some batches have few."""
    teacher = make_decoder("aaa")
    block = replaced_block(teacher, index, mixer_config(teacher.config, kind, 8), "attention")
    batches = [batch([[5, 7], [3, 1, 6]], learnt=0.9), batch([[4]], learnt=0.3)]
    found = importance.cost(teacher, index, block, batches)
    assert found > 1e-3
    assert found == pytest.approx(plain_cost(teacher, index, block, batches), rel=1e-4)


def test_a_block_put_back_costs_nothing(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("aa")
    found = importance.cost(teacher, 0, teacher.blocks[0], [batch([[12]], learnt=0.5)])
    assert abs(found) < 1e-6


# ---------------------------------------------------------------- all layers


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def keep(tmp_path: Path) -> KeepImportant:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = {"kind": "text", "path": path}
    return KeepImportant(kind="important", count=1, data=data, rows=3, length=32)


def measured(decoder: Decoder, keep: KeepImportant, tokenizer: Any, seed: int) -> dict[int, float]:
    torch.manual_seed(seed)
    mixer = mixer_config(decoder.config, "mamba2", 8)
    return importance.measure(decoder, mixer, "attention", keep, tokenizer, seed)


def test_each_layer_is_replaced_alone(
    make_decoder: MakeDecoder, tokenizer: PreTrainedTokenizerBase, keep: KeepImportant
) -> None:
    """From the same seed, on the first rows of the data."""
    teacher = make_decoder("aaa", vocab_size=300)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    costs = measured(teacher, keep, tokenizer, seed=5)
    torch.manual_seed(5)
    mixer = mixer_config(teacher.config, "mamba2", 8)
    blocks = [replaced_block(teacher, index, mixer, "attention") for index in range(3)]
    rows = Rows(open_data(keep.data, tokenizer, 5), 1, 32, range(1))
    batches = [rows.batch() for _ in range(3)]
    wanted = {i: plain_cost(teacher, i, block, batches) for i, block in enumerate(blocks)}
    assert costs == pytest.approx(wanted, rel=1e-4)
    assert len({round(value, 6) for value in costs.values()}) == 3
    assert measured(teacher, keep, tokenizer, seed=5) == costs
    assert measured(teacher, keep, tokenizer, seed=6) != costs
    assert_unchanged(teacher, before)


def assert_unchanged(decoder: Decoder, before: dict[str, Tensor]) -> None:
    after = decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(decoder.config.layer_types) == {ATTENTION}


def test_layers_replaced_before_are_not_measured(
    make_decoder: MakeDecoder, tokenizer: PreTrainedTokenizerBase, keep: KeepImportant
) -> None:
    teacher = make_decoder("aaa", vocab_size=300)
    source = transplant(teacher, [ATTENTION, LINEAR, ATTENTION]).eval()
    assert measured(source, keep, tokenizer, seed=0).keys() == {0, 2}


def test_more_layers_than_there_are_cannot_be_kept(
    make_decoder: MakeDecoder, tokenizer: PreTrainedTokenizerBase, keep: KeepImportant
) -> None:
    three = keep.model_copy(update={"count": 3})
    message = r"student\.keep_attention\.count: 3, but only 2 layers have attention"
    with pytest.raises(ValueError, match=message):
        measured(make_decoder("aa", vocab_size=300), three, tokenizer, seed=0)


@pytest.mark.parametrize(
    ("count", "wanted"), [(0, []), (1, [4]), (2, [1, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4])]
)
def test_the_costliest_layers_in_their_order(count: int, wanted: list[int]) -> None:
    costs = {0: 0.01, 1: 0.7, 2: 0.3, 4: 2.0}
    assert importance.highest(costs, count) == wanted
    assert importance.highest(dict(reversed(costs.items())), count) == wanted


# ---------------------------------------------------------------- not twice


def test_costs_are_remembered_for_the_same_recipe_alone(tmp_path: Path) -> None:
    costs = {3: 0.1 + 0.2, 11: 1e-9}
    assert importance.remembered(tmp_path, "one") is None
    importance.remember(tmp_path, "one", costs)
    assert importance.remembered(tmp_path, "one") == costs
    assert importance.remembered(tmp_path, "two") is None
    importance.remember(tmp_path, "two", {0: 1.0})
    assert importance.remembered(tmp_path, "one") is None
    assert importance.remembered(tmp_path, "two") == {0: 1.0}
    assert [path.name for path in tmp_path.iterdir()] == [importance.FILE]
