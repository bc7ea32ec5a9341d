"""A student given to the world: read by transformers, left whole by retort, described by a card."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.model.theirs import skip_where_groups_differ
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import retort
from retort.data.chat import load_tokenizer
from retort.model.config import DiscreteMamba2Config, Llama3Rope, Mamba2Config
from retort.model.decoder import Decoder
from retort.publishing import publish_folder
from retort.recipe import BUNDLED_TEACHER

MakeDecoder = Callable[..., Decoder]

CURVES = Path(__file__).parents[1] / "benchmarks" / "results" / "demo-curves.json"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(BUNDLED_TEACHER)


@pytest.fixture
def make_student(make_decoder: MakeDecoder, tokenizer: PreTrainedTokenizerBase) -> MakeDecoder:
    """Students with the geometry of the attention they replace, and the tokenizer's vocabulary."""

    def make(layers: str, **changes: Any) -> Decoder:
        mixer = Mamba2Config(heads=4, head_dim=8, state_size=8, groups=4, chunk_size=4)
        settings = {"mixer": mixer, "vocab_size": len(tokenizer)}
        settings |= {"eos_token_ids": (tokenizer.eos_token_id,)}
        settings |= {"pad_token_id": tokenizer.pad_token_id}
        return make_decoder(layers, **settings | changes)

    return make


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("layers", ["mm", "ma", "aa"])
def test_a_batch_of_questions_through_transformers(
    tmp_path: Path,
    make_student: MakeDecoder,
    tokenizer: PreTrainedTokenizerBase,
    layers: str,
) -> None:
    """With nothing but what the folder holds, as the card says: template, padding and all."""
    ours = make_student(layers)
    retort.publish(ours, tmp_path / "out", tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    skip_where_groups_differ(model)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.padding_side == "left"
    chats = [[{"role": "user", "content": text}] for text in ("Short.", "A longer question?")]
    inputs = theirs.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert (inputs["attention_mask"][0] == 0).any()
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    params = retort.SamplingParams(n=1, max_tokens=12, temperature=0)
    for row, chat in enumerate(chats):
        prompt = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        wanted = retort.Engine(ours, slots=1).generate([prompt], params)[0][0].token_ids
        length = inputs["input_ids"].shape[1]
        assert found[row, length : length + len(wanted)].tolist() == list(wanted)


def test_the_given_tokenizer_is_left_alone(
    tmp_path: Path, make_student: MakeDecoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    side = tokenizer.padding_side
    retort.publish(make_student("ma"), tmp_path / "out", tokenizer)
    assert tokenizer.padding_side == side == "right"


def test_llama_cpp_gets_wide_mixers(tmp_path: Path, make_student: MakeDecoder) -> None:
    ours = make_student("ma")
    retort.publish(ours, tmp_path / "out", llama_cpp=True)
    config = config_of(tmp_path / "out")
    assert config["mamba_expand"] == 2
    assert config["mamba_n_heads"] * config["mamba_d_head"] == 2 * config["hidden_size"]
    # The converter of llama.cpp would leave RoPE out without the second.
    assert config["architectures"] == ["GraniteMoeHybridForCausalLM", "BambaForCausalLM"]
    ids_BT = torch.randint(61, (1, 9))
    torch.testing.assert_close(retort.load(tmp_path / "out")(ids_BT), ours(ids_BT))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    skip_where_groups_differ(theirs)
    assert type(theirs).__name__ == "GraniteMoeHybridForCausalLM"
    torch.testing.assert_close(theirs(ids_BT).logits, ours(ids_BT), atol=1e-4, rtol=0)


def test_llama_cpp_leaves_attention_alone(tmp_path: Path, make_student: MakeDecoder) -> None:
    ours = make_student("aa")
    retort.publish(ours, tmp_path / "out", llama_cpp=True)
    assert retort.load(tmp_path / "out").config == replace(ours.config, mixer=None)


def test_llama_cpp_refuses_scaled_rope(tmp_path: Path, make_student: MakeDecoder) -> None:
    scaled = make_student("ma", rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64))
    with pytest.raises(ValueError, match=r"llama\.cpp cannot convert llama3 RoPE scaling"):
        retort.publish(scaled, tmp_path / "out", llama_cpp=True)
    retort.publish(scaled, tmp_path / "out")
    assert config_of(tmp_path / "out")["architectures"] == ["GraniteMoeHybridForCausalLM"]


def test_what_cannot_be_published_leaves_nothing(tmp_path: Path, make_student: MakeDecoder) -> None:
    discrete = DiscreteMamba2Config(heads=4, head_dim=8, state_size=8, groups=4)
    with pytest.raises(ValueError, match=r"cannot be published.*discrete_mamba2.*student.mixer"):
        retort.publish(make_student("mm", mixer=discrete), tmp_path / "out")
    with pytest.raises(ValueError, match="normalise queries and keys"):
        retort.publish(make_student("ma", qk_norm=True, family="qwen3"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_card(
    tmp_path: Path, make_student: MakeDecoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    retort.publish(
        make_student("ma"),
        tmp_path / "out",
        tokenizer,
        name="My student",
        base_model="someone/teacher",
        license="apache-2.0",
    )
    _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "someone/teacher"
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert "# My student" in text
    assert "attention in 1, mamba2 in the others" in text
    assert "apply_chat_template" in text
    assert "vllm serve" in text
    assert "convert_hf_to_gguf" not in text  # the mixers are too narrow for llama.cpp


@pytest.mark.parametrize(
    ("layers", "groups", "told"), [("ma", 4, True), ("m", 1, False), ("a", 4, False)]
)
def test_the_card_names_the_oldest_transformers(
    tmp_path: Path, make_student: MakeDecoder, layers: str, groups: int, told: bool
) -> None:
    mixer = Mamba2Config(heads=4, head_dim=8, state_size=8, groups=groups, chunk_size=4)
    retort.publish(make_student(layers, mixer=mixer), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("It needs transformers 5.23 or newer." in card) == told


def test_a_folder(
    tmp_path: Path, make_student: MakeDecoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, out = tmp_path / "hybrid", tmp_path / "out"
    retort.save(make_student("ma"), model, tokenizer)
    publish_folder(model, out, base_model="someone/teacher", curves=CURVES)
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert "coverage" in (out / "README.md").read_text()
    publish_folder(model, out)  # again, in its own place
    assert "coverage at" not in (out / "README.md").read_text()


def test_folder_mistakes(
    tmp_path: Path, make_student: MakeDecoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tmp_path / "student"
    retort.save(make_student("ma"), model, tokenizer)
    with pytest.raises(ValueError, match="is the model itself"):
        publish_folder(model, tmp_path / "x" / ".." / "student")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("kept")
    with pytest.raises(ValueError, match="holds files but no checkpoint"):
        publish_folder(model, tmp_path / "notes")
    (tmp_path / "curves.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not the curves\.json of a report"):
        publish_folder(model, tmp_path / "new", curves=tmp_path / "curves.json")
    assert not (tmp_path / "new").exists()
