"""What a run opens before it trains: models, tokenizer, data; and every mistake it can find there.

Nothing is written here. Weights are read by the main process alone, in float32 and on the CPU, so
that a model need fit no single GPU; the others learn its shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from retort import console
from retort.data import problems
from retort.data.chat import check_same_tokenizer, load_tokenizer, train_tokenizer
from retort.data.mixture import open_data
from retort.data.packing import check
from retort.data.problems import Problem
from retort.model import weights
from retort.model.config import ATTENTION, LINEAR, DecoderConfig, Mamba1Config
from retort.model.decoder import Decoder
from retort.model.devices import open_device
from retort.model.transplant import mixer_config, transplant
from retort.recipe import (
    Continued,
    Distill,
    DistillRecipe,
    Fresh,
    KeepImportant,
    Transplanted,
)
from retort.trackers import check_trackers
from retort.train import importance
from retort.train.evaluation import Questions, open_questions
from retort.train.folder import TOKENIZER, identity, work_folder
from retort.train.objectives import trainable
from retort.train.outline import fresh_config, layer_types
from retort.train.schedule import not_frozen
from retort.train.world import World

TOKENIZER_TEXTS = 8000


@dataclass(frozen=True)
class Job:
    """What a recipe's folders hold, in memory: models, tokenizer, what the layers that it measures
    cost, the questions of its evaluation, and the problems that training must not see.
    """

    recipe: DistillRecipe
    student: Decoder
    teacher: Decoder | None
    tokenizer: PreTrainedTokenizerBase
    costs: dict[int, float] = field(default_factory=dict)
    questions: Questions | None = None
    against: tuple[Problem, ...] = ()

    @property
    def work(self) -> Path:
        """Where checkpoints and metrics are."""
        return work_folder(self.recipe.out)


def prepare_all(recipe: DistillRecipe, world: World) -> Job:
    """`prepare` on the main process; what the others need to take part, on those.

    Raises ValueError on every process for what any of them finds.
    """
    job = world.agree(lambda: prepare(recipe, world.size) if world.main else None)
    configs = world.from_main(_configs(job))
    return world.agree(lambda: job or _without_weights(recipe, *configs))


def _without_weights(
    recipe: DistillRecipe, config: DecoderConfig | None, teacher: DecoderConfig | None
) -> Job:
    assert config is not None
    models = weights.empty(config), None if teacher is None else weights.empty(teacher)
    return _opened(Job(recipe, *models, _tokenizer(recipe)))


def _opened(job: Job) -> Job:
    """The job with the problems that its recipe names."""
    recipe = job.recipe
    questions = None
    if recipe.evaluation is not None:
        questions = open_questions(recipe.evaluation, job.tokenizer, job.student.config)
    against = tuple(problem for spec in recipe.decontaminate for problem in problems.load(spec))
    return replace(job, questions=questions, against=against)


def _configs(job: Job | None) -> tuple[DecoderConfig | None, DecoderConfig | None]:
    """Of the student and of the teacher."""
    if job is None:
        return None, None
    return job.student.config, None if job.teacher is None else job.teacher.config


def prepare(recipe: DistillRecipe, processes: int = 1) -> Job:
    """Opens everything the run needs, so that mistakes show before anything is written."""
    _check_out(recipe)
    check_rows(recipe, processes)
    torch.manual_seed(recipe.seed)
    teacher, costs = None, dict[int, float]()
    if recipe.teacher is not None:
        teacher = weights.load(recipe.teacher, torch.float32)
    match recipe.student:
        case Transplanted() as spec:
            assert teacher is not None
            tokenizer = _tokenizer(recipe)
            source = _open_source_model(recipe, spec, teacher, tokenizer)
            costs = _costs(recipe, spec, source, tokenizer)
            torch.manual_seed(recipe.seed)  # whether or not layers were measured just now
            student = _transplanted(spec, source, costs)
        case Fresh() as spec:
            tokenizer = _tokenizer(recipe)
            student = _fresh_student(spec, tokenizer)
        case Continued() as spec:
            student = weights.load(spec.folder, torch.float32)
            tokenizer = _tokenizer(recipe)
            if recipe.teacher is not None:
                teacher_tokenizer = load_tokenizer(recipe.teacher)
                check_same_tokenizer(teacher_tokenizer, tokenizer, spec.folder)
    check_shapes(recipe, student, teacher)
    _check_heads(tokenizer, student, teacher)
    check_trackers(recipe.trackers)
    job = _opened(Job(recipe, student.train(), teacher, tokenizer, costs))
    for stage in recipe.stages:
        not_frozen(trainable(student, stage.objective), stage.freeze)
        check(open_data(stage.data, tokenizer, recipe.seed, job.against), stage.length)
    return job


def _tokenizer(recipe: DistillRecipe) -> PreTrainedTokenizerBase:
    match recipe.student:
        case Transplanted():
            assert recipe.teacher is not None
            return load_tokenizer(recipe.teacher)
        case Fresh() as spec:
            return _fresh_tokenizer(recipe, spec)
        case Continued() as spec:
            return load_tokenizer(spec.folder)


def check_rows(recipe: DistillRecipe, processes: int) -> None:
    for stage in recipe.stages:
        if stage.rows % processes:
            raise ValueError(
                f"stage {stage.name}: {stage.rows} rows cannot be shared by {processes} processes; "
                "rows must be a multiple of them"
            )


def _open_source_model(
    recipe: DistillRecipe, spec: Transplanted, teacher: Decoder, tokenizer: PreTrainedTokenizerBase
) -> Decoder:
    """What the student is made from: the teacher, or a student that is taken further."""
    if spec.source is None:
        return teacher
    source = weights.load(spec.source, torch.float32)
    check_same_tokenizer(tokenizer, load_tokenizer(spec.source), spec.source)
    return source


def _costs(
    recipe: DistillRecipe, spec: Transplanted, source: Decoder, tokenizer: PreTrainedTokenizerBase
) -> dict[int, float]:
    """What replacing each layer costs, where that decides which are; nothing is written yet."""
    keep = spec.keep_attention
    if not isinstance(keep, KeepImportant):
        return {}
    known = importance.remembered(work_folder(recipe.out), identity(recipe))
    if known is not None and not recipe.force:
        return known
    mixer = mixer_config(source.config, spec.mixer, **spec.settings.model_dump())
    source.to(open_device(recipe.device))
    found = importance.measure(source, mixer, spec.initial, keep, tokenizer, recipe.seed)
    source.to("cpu")
    return found


def _transplanted(spec: Transplanted, source: Decoder, costs: dict[int, float]) -> Decoder:
    types = layer_types(spec.keep_attention, source.config, costs)
    if isinstance(spec.keep_attention, KeepImportant):
        kept = [str(i) for i, kind in enumerate(types) if kind == ATTENTION]
        console.say(f"attention stays in layers {', '.join(kept) or 'none'}")
    settings = spec.settings.model_dump()
    return transplant(source, types, spec.mixer, start=spec.initial, **settings)


def _check_out(recipe: DistillRecipe) -> None:
    """Refuses to write over a model that no earlier run of this recipe has made."""
    weights.check_target(recipe.out)
    own = work_folder(recipe.out).is_dir() or recipe.force
    if recipe.teacher is not None and recipe.out.resolve() == recipe.teacher.resolve():
        raise ValueError(f"out: {recipe.out} is the teacher's folder; choose another")
    if (recipe.out / weights.CONFIG).is_file() and not own:
        raise ValueError(f"out: {recipe.out} holds a model; choose another, or add force=true")


def check_shapes(recipe: DistillRecipe, student: Decoder, teacher: Decoder | None) -> None:
    """Layer-wise objectives compare layer i with layer i. (`distill` compares token with token,
    whose names `check_same_tokenizer` looks at: heads may be padded differently.) Whoever attends
    reads no further than it has positions.
    """
    _check_positions(recipe, student, teacher)
    if teacher is None:
        return
    kinds = {stage.objective.kind for stage in recipe.stages}
    _check_answers(recipe, student, teacher)
    if not kinds & {"mixing_matrices", "hidden_states"}:
        return
    if LINEAR not in student.config.layer_types:
        raise ValueError("student: no layer is replaced, and layer-wise stages train only those")
    for key in ("layers", "hidden_size", "heads", "head_dim", "rope_theta", "rope_scaling"):
        ours, theirs = getattr(student.config, key), getattr(teacher.config, key)
        if ours != theirs:
            raise ValueError(f"student: {key} is {ours}, but the teacher's is {theirs}")
    if "mixing_matrices" in kinds:
        _check_matrices(student, teacher)


def _check_positions(recipe: DistillRecipe, student: Decoder, teacher: Decoder | None) -> None:
    for name, decoder in (("student", student), ("teacher", teacher)):
        if decoder is None or not decoder.config.attention_layers:
            continue
        for stage in recipe.stages:
            if stage.length > decoder.config.max_position:
                raise ValueError(
                    f"stage {stage.name}: length = {stage.length} exceeds the "
                    f"{decoder.config.max_position} positions of the {name}"
                )


def _check_answers(recipe: DistillRecipe, student: Decoder, teacher: Decoder) -> None:
    """What a student writes itself the teacher has to read."""
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    objectives = [stage.objective for stage in recipe.stages]
    if ours > theirs and any(isinstance(o, Distill) and o.on_policy for o in objectives):
        raise ValueError(
            f"student: vocab_size is {ours}, and the teacher's {theirs}: on_policy needs a teacher "
            "that reads all a student may write"
        )


def _check_heads(
    tokenizer: PreTrainedTokenizerBase, student: Decoder, teacher: Decoder | None
) -> None:
    """A logit for each token that there is; more of them are padding."""
    for name, decoder in (("student", student), ("teacher", teacher)):
        if decoder is not None and decoder.config.vocab_size < len(tokenizer):
            raise ValueError(
                f"{name}: its head has {decoder.config.vocab_size} logits for the {len(tokenizer)} "
                "tokens of its tokenizer"
            )


def _check_matrices(student: Decoder, teacher: Decoder) -> None:
    """A matrix for each head on either side."""
    mixer = student.config.mixer
    if isinstance(mixer, Mamba1Config):
        raise ValueError("student: mamba1 has no mixing matrices to match; leave that stage out")
    assert mixer is not None
    if mixer.heads != teacher.config.heads:
        raise ValueError(
            f"student: its mixers have {mixer.heads} heads and the teacher's attention has "
            f"{teacher.config.heads}: mixing_matrices compares head with head, leave that stage out"
        )


def _fresh_tokenizer(recipe: DistillRecipe, spec: Fresh) -> PreTrainedTokenizerBase:
    """Made of the first texts of the first stage, or what an earlier start has made of them."""
    kept = work_folder(recipe.out) / TOKENIZER
    if kept.is_dir() and not recipe.force:
        return load_tokenizer(kept)
    texts = open_data(recipe.stages[0].data, None, recipe.seed).texts()
    return train_tokenizer(islice(texts, TOKENIZER_TEXTS), spec.vocab_size)


def _fresh_student(spec: Fresh, tokenizer: PreTrainedTokenizerBase) -> Decoder:
    assert isinstance(tokenizer.eos_token_id, int)
    config = replace(
        fresh_config(spec, len(tokenizer)),
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    student = Decoder(config)
    student.reset_parameters()
    return student
