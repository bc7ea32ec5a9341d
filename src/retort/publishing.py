"""Gives a student to the world: a folder that other programs run with no extra code."""

from __future__ import annotations

from copy import copy
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from retort.console import format_count
from retort.data.chat import load_tokenizer
from retort.inspection import format_bytes
from retort.model import cost, formats, weights
from retort.model.config import DecoderConfig
from retort.model.decoder import Decoder
from retort.model.formats import Writer, granite
from retort.model.widen import wide_config, widened
from retort.recipe import DistillRecipe
from retort.report import card
from retort.report.curves import Curves

CARD = "README.md"


def publish(
    decoder: Decoder,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    recipe: DistillRecipe | None = None,
    curves: Curves | None = None,
    llama_cpp: bool = False,
) -> None:
    """Writes weights, configuration, tokenizer, chat template and a model card.

    Attention alone is written as the teacher's family, Mamba-2 students as GraniteMoeHybrid. The
    tokenizer pads on the left, since padding behind a prompt would enter the states of
    state-space layers. `base_model`, `license`, `recipe` and `curves` are for the card. With
    `llama_cpp` the mixers are widened with heads of zeros until llama.cpp runs them.

    Raises ValueError for a decoder that no format of other programs can hold, saying what to
    change, and for a folder that holds something other than a model. Nothing is half-written.
    """
    folder = Path(folder)
    writer, config = _target(decoder.config, folder, llama_cpp)
    if config != decoder.config:
        decoder = widened(decoder, 2 * config.hidden_size)
    readme = card.write(
        card.Card(
            title=name or folder.name,
            architecture=writer.config(decoder.config, "float32")["architectures"][0],
            layers=_facts(decoder),
            base_model=base_model,
            license=license,
            recipe=recipe,
            curves=curves,
            runtimes=_served(decoder.config, writer),
            oldest_transformers=granite.oldest_transformers(decoder.config),
            chat=tokenizer is not None and tokenizer.chat_template is not None,
        )
    )
    if tokenizer is not None:
        tokenizer = copy(tokenizer)
        # Saved are the settings that it was made with, at the values that they have now.
        tokenizer.padding_side = "left"
        tokenizer.init_kwargs = tokenizer.init_kwargs | {"padding_side": "left"}
    weights.write(decoder, folder, writer, tokenizer, {CARD: readme})


def publish_folder(
    model: Path,
    out: Path,
    base_model: str | None = None,
    license: str | None = None,
    curves: Path | None = None,
    llama_cpp: bool = False,
) -> None:
    """`publish` for a model folder, with its tokenizer, and the recipe it was distilled by if its
    training folder is still beside it. Raises ValueError as `publish` does.
    """
    if out.resolve() == model.resolve():
        raise ValueError(f"{out}: is the model itself; choose another folder to publish it in")
    _target(weights.read_config(model), out, llama_cpp)  # before the weights are read
    weights.check_target(out)
    recipe = card.find_recipe(model)
    publish(
        weights.load(model),
        out,
        load_tokenizer(model),
        base_model=base_model or (recipe.teacher.name if recipe and recipe.teacher else None),
        license=license,
        recipe=recipe,
        curves=None if curves is None else Curves.read(curves),
        llama_cpp=llama_cpp,
    )


def _target(config: DecoderConfig, folder: Path, llama_cpp: bool) -> tuple[Writer, DecoderConfig]:
    """The format to publish in, and what is written in it: with wider mixers for llama.cpp."""
    writer = formats.portable(config)
    if writer is None:
        reasons = "; ".join(granite.GRANITE.refusals(config))
        raise ValueError(
            f"{folder}: this model cannot be published, since {reasons} (docs/models.md#given-away)"
        )
    if llama_cpp:
        config = wide_config(config, 2 * config.hidden_size) if config.linear_layers else config
        reason = writer.runtimes(config)["llama.cpp"]
        if reason:
            raise ValueError(
                f"llama.cpp {reason}; publish without --llama-cpp (docs/serving.md#llamacpp)"
            )
    return writer, config


def _served(config: DecoderConfig, writer: Writer) -> list[str]:
    """The programs that run the model as it is written."""
    return [program for program, reason in writer.runtimes(config).items() if not reason]


def _facts(decoder: Decoder) -> list[tuple[str, str]]:
    """The architecture, as rows of the card's table."""
    config = decoder.config
    itemsize = decoder.lm_head.weight.element_size()
    dtype = str(decoder.lm_head.weight.dtype).removeprefix("torch.")
    facts = [
        ("parameters", f"{format_count(decoder.size)}, {dtype}"),
        ("layers", _layers(config)),
        ("width", f"{config.hidden_size}, MLP {config.intermediate_size}"),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]
    if config.linear_layers and config.mixer is not None:
        state = format_bytes(cost.state_bytes(config, itemsize))
        facts.append(("state of a sequence", f"{state}, whatever its length"))
    if config.attention_layers:
        cached = format_bytes(cost.kv_bytes_per_token(config, itemsize))
        facts.append(("keys and values", f"{cached} for each token"))
    return facts


def _layers(config: DecoderConfig) -> str:
    if not config.linear_layers or config.mixer is None:
        return f"{config.layers}, all attention"
    if not config.attention_layers:
        return f"{config.layers}, all {config.mixer.kind}"
    kept = ", ".join(str(index) for index in config.attention_layers)
    return f"{config.layers}: attention in {kept}, {config.mixer.kind} in the others"
