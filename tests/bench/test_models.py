"""Models come from folders or are made; names are told apart."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import retort
from retort.bench import models as opening
from retort.bench.models import Model, open_models, random_decoder, sizes
from retort.model import cost, geometries
from retort.model.decoder import Decoder
from retort.ops.cpu import products


@pytest.fixture
def folders(models: list[Model], tmp_path: Path) -> list[str]:
    for model in models:
        retort.save(model.decoder, tmp_path / model.name)
    return [str(tmp_path / model.name) for model in models]


def test_folders_by_their_names(folders: list[str], models: list[Model]) -> None:
    opened = open_models(folders, "cpu")
    assert [(each.name, each.config) for each in opened] == [
        (each.name, each.config) for each in models
    ]


def test_folders_of_one_name_are_told_apart(models: list[Model], tmp_path: Path) -> None:
    for part in ("old", "new"):
        retort.save(models[0].decoder, tmp_path / part / "student")
    names = [str(tmp_path / part / "student") for part in ("old", "new")]
    assert [each.name for each in open_models(names, "cpu")] == names


def test_geometries_have_random_weights(models: list[Model]) -> None:
    config = replace(models[2].config, tie_embeddings=True)
    made = random_decoder(config, torch.device("cpu"), torch.bfloat16)
    assert made.size == cost.parameters(config).total
    assert made.lm_head.weight is made.model.embed_tokens.weight
    dtypes = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    assert {n for n, d in dtypes.items() if d == torch.float32} == {
        f"model.layers.1.mamba.{rate}" for rate in ("A_log", "D", "dt_bias")
    }
    logits_BTV = made(torch.randint(config.vocab_size, (2, 5)))
    assert logits_BTV.isfinite().all()
    assert logits_BTV.std() > 0.1
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_weights_of_published_sizes_are_as_those_are(
    models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "suited", lambda: True)
    monkeypatch.setattr(opening, "_config", lambda name: models[2].config)
    published, small = open_models(["llama-3.2-1b", "small"], "cpu")
    assert 2 < published.read_itemsize < 2.001, "the mixers' rates alone are in float32"
    assert (published.itemsize, small.itemsize) == (4, 4)
    assert small.read_itemsize > 3.9, "norms that are all 1"
    monkeypatch.setattr(products, "suited", lambda: False)
    (elsewhere,) = open_models(["llama-3.2-1b"], "cpu")
    assert elsewhere.read_itemsize == 4


def test_making_weights_leaves_the_generator_alone(models: list[Model]) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    random_decoder(models[0].config, torch.device("cpu"), torch.float32)
    assert torch.rand(1) == wanted


def test_without_names_a_teacher_and_two_students(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(opening.DEFAULTS["cpu"]) | set(opening.DEFAULTS["cuda"]) <= set(
        geometries.GEOMETRIES
    )
    opened = open_models([], "cpu")
    assert [each.name for each in opened] == ["small", "small-pure", "small-hybrid"]
    assert [len(each.config.attention_layers) for each in opened] == [6, 0, 1]
    config = opened[0].config
    assert (config.hidden_size, config.layers, config.vocab_size) == (256, 6, 2048)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 64)


def test_unknown_names_are_refused_before_any_model_is_made(
    folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object) -> Decoder:
        raise AssertionError("a model was made")

    monkeypatch.setattr(opening, "_open", made)
    with pytest.raises(ValueError, match=r"^nowhere/model: no such folder$"):
        open_models([*folders, "nowhere/model"], "cpu")
    with pytest.raises(ValueError, match=r"smal: no such folder, and .* did you mean 'small'"):
        open_models([*folders, "smal"], "cpu")
    with pytest.raises(ValueError, match="device 'abacus'"):
        open_models(folders, "abacus")


def test_sizes_are_those_of_the_state(models: list[Model]) -> None:
    for model in models:
        found = sizes(model)
        state = model.decoder.init_state(2, 10)
        assert state.nbytes == 2 * (found.state_bytes + 10 * found.kv_bytes_per_token)
        assert found.parameters == model.decoder.size
        assert found.attention_layers + found.linear_layers == 2
