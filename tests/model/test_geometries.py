"""Published sizes: the parameter counts and configurations that their authors give."""

from dataclasses import replace

import pytest

from retort.model import cost, transplant
from retort.model.config import ATTENTION, DecoderConfig
from retort.model.formats import llamba, mamba_in_llama
from retort.model.geometries import GEOMETRIES, geometry

# As the checkpoints' files hold them.
EXACT = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
}

# As papers round them (arXiv 2502.14458, 2502.20339).
ROUNDED = {
    "llamba-1b": 1.41e9,
    "llamba-4b": 3.65e9,
    "llamba-8b": 8.32e9,
    "hybrid-1b": 1.29e9,
    "hybrid-3b": 3.448e9,
}

TEACHERS = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "4b": "llama-3.2-3b", "8b": "llama-3.1-8b"}
TEACHERS |= {"pure": "small", "hybrid": "small"}
STUDENTS = [name for name, config in GEOMETRIES.items() if config.mixer is not None]


def teacher_of(student: str) -> DecoderConfig:
    return geometry(TEACHERS[student.split("-")[1]])


@pytest.mark.parametrize("name", EXACT)
def test_exact_size(name: str) -> None:
    assert cost.parameters(geometry(name)).total == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_size(name: str) -> None:
    assert cost.parameters(geometry(name)).total == pytest.approx(ROUNDED[name], rel=5e-3)


@pytest.mark.parametrize("name", STUDENTS)
def test_student_is_its_teacher_with_other_mixers(name: str) -> None:
    teacher, student = teacher_of(name), geometry(name)
    assert student.layers == teacher.layers
    # Llamba-8B ties its head where its teacher does not.
    tied = student.tie_embeddings if name == "llamba-8b" else teacher.tie_embeddings
    back = replace(student, layer_types=teacher.layer_types, mixer=None)
    assert back == replace(teacher, tie_embeddings=tied)


def test_native_students_are_what_transplanting_makes() -> None:
    for name in STUDENTS:
        if name.startswith("native"):
            expected = transplant.mixer_config(teacher_of(name), "mamba2")
            assert geometry(name).mixer == expected, name


def test_hybrids_are_what_transplanting_makes() -> None:
    for name in ("hybrid-1b", "hybrid-3b"):
        teacher = teacher_of(name)
        student = geometry(name)
        assert student.mixer == transplant.mixer_config(teacher, "mamba1")
        assert student.layer_types == tuple(transplant.as_paper(teacher.layers))


def test_native_hybrids_keep_the_layers_of_the_published_ones() -> None:
    for size in ("1b", "3b"):
        native = geometry(f"native-{size}-hybrid")
        assert native.layer_types == geometry(f"hybrid-{size}").layer_types
        assert ATTENTION not in geometry(f"native-{size}").layer_types


def test_llamba_is_its_published_configuration() -> None:
    published = {  # cartesia-ai/Llamba-3B, config.json
        "vocab_size": 128_256,
        "tie_embeddings": True,
        "pad_vocab_size_multiple": 8,
        "lm_head_bias": False,
        "d_model": 3072,
        "n_layer": 28,
        "norm_epsilon": 1e-5,
        "mlp_cfg": {"intermediate_size": 8192, "bias": False, "act_fn": "silu"},
        "ssm_cfg": {
            "d_state": 64,
            "n_v_heads": 32,
            "n_qk_heads": 32,
            "expand": 1,
            "chunk_size": 128,
            "activation": "identity",
            "bias": False,
        },
    }
    read, ours = llamba.READER.config(published), geometry("llamba-4b")
    assert read.mixer == ours.mixer
    assert cost.parameters(read) == cost.parameters(ours)


def test_hybrid_has_the_mixers_of_published_ones() -> None:
    mamba = {"d_model": 3072, "d_inner": 3072, "d_xb": 1024, "n_layer": 28, "ssm_cfg": {}}
    values = {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "mamba_config": mamba | {"attn_layers": [3, 8, 13, 18, 23, 27], "released_quirks": False},
    }
    read, ours = mamba_in_llama.READER.config(values), geometry("hybrid-3b")
    assert (read.mixer, read.layer_types) == (ours.mixer, ours.layer_types)


def test_misspelt_name_is_answered_with_the_likely_one() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'llama-3\.2-1b'"):
        geometry("Llama3.2-1B")


def test_unknown_name_is_answered_with_all() -> None:
    with pytest.raises(ValueError, match=r"known here: llama-3\.2-1b, .*native-3b-hybrid"):
        geometry("gpt")


def test_names_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        GEOMETRIES["llama-3.2-1b"] = GEOMETRIES["llama-3.2-3b"]  # type: ignore[index]
