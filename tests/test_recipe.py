"""Recipes: what is read, what wins, and one line for each mistake."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort import recipe
from retort.recipe import (
    BUNDLED_TEACHER,
    RECIPES,
    Arithmetic,
    Distill,
    DistillRecipe,
    Fresh,
    Jsonl,
    Keep,
    KeepEvery,
    KeepImportant,
    KeepLayers,
    KeepPaper,
    Optim,
    RecipeError,
    SampleRecipe,
    Supervised,
    Transplanted,
    Worked,
)

Values = dict[str, Any]

STAGE: Values = {
    "name": "one",
    "objective": {"kind": "supervised"},
    "data": {"kind": "worked", "problems": {"kind": "arithmetic"}},
    "tokens": 1000,
    "optim": {"lr": 1e-3},
}
DISTILL: Values = {"out": "runs/out", "student": {"start": "fresh"}, "stages": [STAGE]}
SAMPLE: Values = {"out": "runs/out", "model": "models/a", "problems": {"kind": "arithmetic"}}


def write(path: Path, values: Values | str) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def mistakes(values: Values, kind: type[recipe.Frozen] = DistillRecipe) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(kind, values)
    return str(caught.value).splitlines()


def changed(values: Values, path: str, value: Any) -> Values:
    """A copy with one value set; an ellipsis takes the key away."""
    *parents, last = path.split(".")
    copy: Values = deepcopy(values)
    place: Any = copy
    for key in parents:
        place = place[int(key) if key.isdecimal() else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


# ---------------------------------------------------------------- what is read


def test_a_distillation(tmp_path: Path) -> None:
    read = recipe.load(DistillRecipe, [write(tmp_path / "a.yaml", DISTILL)])
    assert read.out == Path("runs/out")
    assert read.student == Fresh(start="fresh")
    (stage,) = read.stages
    assert stage.objective == Supervised(kind="supervised")
    assert isinstance(stage.data, Worked)
    assert stage.data.problems == Arithmetic(kind="arithmetic")
    assert stage.optim == Optim(lr=1e-3)


def test_a_sampling_run() -> None:
    read = recipe.parse(SampleRecipe, SAMPLE)
    assert read.sampling.n == 256
    assert "{question}" in read.prompt
    assert read.model == Path("models/a")


def test_the_bundled_teacher_by_its_name() -> None:
    read = recipe.parse(SampleRecipe, SAMPLE | {"model": "bundled"})
    assert read.model == BUNDLED_TEACHER


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (8192, 1), (8193, 2), (81920, 10)])
def test_steps_cover_the_token_budget(tokens: int, steps: int) -> None:
    read = recipe.parse(DistillRecipe, changed(DISTILL, "stages.0.tokens", tokens))
    assert read.stages[0].steps == steps  # of 16 rows of 512 tokens


def test_recipes_do_not_change() -> None:
    read = recipe.parse(DistillRecipe, DISTILL)
    with pytest.raises(ValueError, match="frozen"):
        read.seed = 3
    assert recipe.parse(DistillRecipe, DISTILL) == read
    assert DistillRecipe.model_validate_json(read.model_dump_json()) == read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e8", 300_000_000),
        ("1e-3", 0.001),
        ("1E3", 1000),
        ("2.5e+3", 2500),
        ("1_000e3", 1_000_000),
        ("10_000", 10_000),
        (".5e1", 5),
    ],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    """YAML 1.1 takes 1e-3 for a word."""
    path = write(tmp_path / "a.yaml", "{out: a, model: b, problems: {kind: arithmetic}}")
    overlay = write(tmp_path / "b.yaml", f"sampling: {{temperature: {text}}}")
    for source in (overlay, f"sampling.temperature={text}"):
        read = recipe.load(SampleRecipe, [path, source])
        assert read.sampling.temperature == pytest.approx(value)
    tokens = recipe.load(
        DistillRecipe, [write(tmp_path / "c.yaml", DISTILL), "stages.0.tokens=3e8"]
    )
    assert tokens.stages[0].tokens == 300_000_000


def test_negative_numbers_are_numbers(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"seed: .* not -1000"):
        recipe.load(DistillRecipe, [write(tmp_path / "a.yaml", DISTILL), "seed=-1e3"])


@pytest.mark.parametrize("text", ["e8", "1e", "0x1e3", "1e-3x", "-e1"])
def test_words_that_look_like_numbers_stay_words(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", SAMPLE)
    assert recipe.load(SampleRecipe, [path, f"name=m{text}"]).name == f"m{text}"
    with pytest.raises(RecipeError, match=r"sampling\.temperature"):
        recipe.load(SampleRecipe, [path, f"sampling.temperature={text}q"])


# ---------------------------------------------------------------- what wins


def test_later_sources_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", SAMPLE | {"sampling": {"n": 8, "max_tokens": 99}})
    second = write(tmp_path / "b.yaml", "sampling: {n: 16}\nslots: 4\n")
    read = recipe.load(SampleRecipe, [first, second, "slots=2"])
    assert (read.sampling.n, read.sampling.max_tokens, read.slots) == (16, 99, 2)
    read = recipe.load(SampleRecipe, [first, "slots=2", "sampling.n=3", second])
    assert (read.sampling.n, read.sampling.max_tokens, read.slots) == (16, 99, 4)


def test_lists_are_replaced_and_not_joined(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", DISTILL)
    second = write(tmp_path / "b.yaml", {"stages": [STAGE | {"name": "other"}]})
    read = recipe.load(DistillRecipe, [first, second])
    assert [stage.name for stage in read.stages] == ["other"]


def test_dotted_keys_reach_into_lists(tmp_path: Path) -> None:
    two = write(tmp_path / "a.yaml", DISTILL | {"stages": [STAGE, STAGE | {"name": "two"}]})
    read = recipe.load(
        DistillRecipe,
        [two, "stages.1.optim.lr=0.5", "stages.0.objective={kind: distill}", "teacher=models/t"],
    )
    assert [stage.optim.lr for stage in read.stages] == [1e-3, 0.5]
    assert read.stages[0].objective == Distill(kind="distill")
    read = recipe.load(DistillRecipe, [two, f"stages.1={yaml.safe_dump(STAGE | {'name': 'new'})}"])
    assert [stage.name for stage in read.stages] == ["one", "new"]


def test_aliases_are_set_one_by_one() -> None:
    """`*data` saves writing; it does not tie the stages together."""
    pure = RECIPES / "demo" / "pure.yaml"
    read = recipe.load(DistillRecipe, [pure, "stages.1.data.problems.seed=77"])
    seeds = [stage.model_dump()["data"]["problems"]["seed"] for stage in read.stages]
    assert [seed == 77 for seed in seeds] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "value"),
    [("name=a=b", "a=b"), ("name=null", None), ("name=", None), ("name='3'", "3"), ("name=é", "é")],
)
def test_values_are_yaml(tmp_path: Path, text: str, value: str | None) -> None:
    read = recipe.load(SampleRecipe, [write(tmp_path / "a.yaml", SAMPLE), text])
    assert read.name == value


def test_arguments_alone_make_a_recipe() -> None:
    arguments = ["out=a", "model=b", "problems.kind=jsonl", "problems.path=c.jsonl"]
    read = recipe.load(SampleRecipe, arguments)
    assert read.problems == Jsonl(kind="jsonl", path=Path("c.jsonl"))


# ---------------------------------------------------------------- mistakes in the sources


def refusal(*sources: str | Path) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(DistillRecipe, sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no.yaml")
    assert message.startswith(f"{tmp_path}/no.yaml: no such recipe file")
    assert "demo/teacher.yaml" in message


def test_folder_for_a_file(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read as a recipe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("words", "a recipe is a mapping"),
    ],
)
def test_unreadable_file(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", content)
    assert refusal(path).startswith(f"{path}: {message}")


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a recipe" in refusal(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stages.1.tokens=5", "stages.1.tokens: '1' is no position in a list of 1 (0 is first)"),
        ("stages.-1.tokens=5", "stages.-1.tokens: '-1' is no position in a list of 1 (0 is first)"),
        ("stages.one.tokens=5", "stages.one.tokens: 'one' is no position"),
        ("stages.3=5", "stages.3: '3' is no position"),
        ("seed.a=5", "seed.a: seed is a single value and has no keys below it"),
        ("out=[", "out: '[' is not a YAML value"),
    ],
)
def test_arguments_that_fit_nowhere(tmp_path: Path, argument: str, message: str) -> None:
    assert refusal(write(tmp_path / "a.yaml", DISTILL | {"seed": 0}), argument).startswith(message)


# ---------------------------------------------------------------- mistakes in the values


def test_all_mistakes_at_once() -> None:
    wrong = changed(DISTILL, "stages.0.optim", {"lrate": 1, "clip": -1})
    wrong = changed(wrong, "stages.0.tokens", "many")
    wrong = changed(wrong, "out", ...)
    found = mistakes(wrong | {"sed": 1})
    assert len(found) == 6
    assert {line.split(":")[0] for line in found} == {
        "out",
        "sed",
        "stages.0.tokens",
        "stages.0.optim.lr",
        "stages.0.optim.lrate",
        "stages.0.optim.clip",
    }


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages.0.optim.lrate", 1, "stages.0.optim.lrate: unknown key, did you mean 'lr'?"),
        ("stages.0.token", 1, "stages.0.token: unknown key, did you mean 'tokens'?"),
        ("student.layer", 1, "student.layer: unknown key, did you mean 'layers'?"),
        (
            "stages.0.data.problems.dificulty",
            [1, 2],
            "stages.0.data.problems.dificulty: unknown key, did you mean 'difficulty'?",
        ),
        ("checkpoints", {"zzz": 1}, "checkpoints.zzz: unknown key, known here: every, keep"),
        ("out", ..., "out: missing, and it has no default"),
        ("stages.0.optim.lr", ..., "stages.0.optim.lr: missing, and it has no default"),
        (
            "stages.0.data.problems.kind",
            ...,
            "stages.0.data.problems: kind is missing, choose 'arithmetic', 'gsm8k', 'math500'",
        ),
        ("stages.0.data", 3, "stages.0.data: must be a mapping of keys to values, not 3"),
        ("stages.0.optim", [1], "stages.0.optim: must be a mapping of keys to values, not [1]"),
        ("stages", 3, "stages: must be a list, not 3"),
        ("seed", -1, "seed: input should be greater than or equal to 0, not -1"),
        ("seed", "x", "seed: input should be a valid integer"),
        ("stages.0.tokens", 1.5, "stages.0.tokens: input should be a valid integer"),
        ("stages.0.optim.betas", [0.9], "stages.0.optim.betas.1: missing"),
        ("stages.0.optim.betas", [0.9, 2], "stages.0.optim.betas.1: input should be less"),
        ("stages.0.name", "a b", "stages.0.name: string should match pattern"),
        (
            "stages.0.length",
            4,
            "stages.0.length: input should be greater than or equal to 8, not 4",
        ),
        ("stages.0.micro_rows", 3, "stages.0: rows must be a multiple of micro_rows"),
        ("stages.0.optim", {"lr": 1, "warmup": 0.6, "decay": 0.6}, "stages.0.optim: warmup and"),
        ("stages.0.data.prompt", "Hm?", "stages.0.data.prompt: must contain {question}"),
        ("stages", [], "stages: empty; a recipe needs at least one"),
        ("stages", [STAGE, STAGE], "stages: every stage needs a name of its own"),
        ("stages.0.objective", {"kind": "distill"}, "teacher: missing; only supervised stages"),
        ("student", {"start": "transplant"}, "teacher: missing; only supervised stages"),
        (
            "stages.0.data.problems.difficulty",
            [5, 2],
            "stages.0.data.problems: difficulty is [least, largest]",
        ),
    ],
)
def test_mistakes_say_where_and_what(path: str, value: Any, message: str) -> None:
    (found,) = mistakes(changed(DISTILL, path, value))
    assert found.startswith(message)
    assert len(found) < 300


def test_unknown_kinds_list_the_known_ones() -> None:
    (found,) = mistakes(changed(DISTILL, "stages.0.objective.kind", "superwised"))
    assert found.startswith("stages.0.objective: ")
    for kind in ("superwised", "supervised", "distill", "hidden_states", "mixing_matrices"):
        assert f"'{kind}'" in found
    (found,) = mistakes(changed(DISTILL, "student.start", "zero"))
    assert found.startswith("student: ")
    for start in ("zero", "fresh", "transplant", "folder"):
        assert f"'{start}'" in found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sampling", {"top_p": 0}, "sampling.top_p: input should be greater than 0, not 0"),
        ("sampling", {"min_p": 1}, "sampling.min_p: input should be less than 1, not 1"),
        ("dtype", "int8", "dtype: input should be 'float32', 'bfloat16' or 'float16', not 'int8'"),
        ("sampling", {"temperatur": 1}, "sampling.temperatur: unknown key, did you mean"),
    ],
)
def test_mistakes_in_sampling(path: str, value: Any, message: str) -> None:
    (found,) = mistakes(changed(SAMPLE, path, value), SampleRecipe)
    assert found.startswith(message)


# ---------------------------------------------------------------- what a student keeps, and gets

HYBRID: Values = DISTILL | {"teacher": "models/t", "student": {"start": "transplant"}}
IMPORTANT: Values = {"kind": "important", "count": 1, "data": STAGE["data"]}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([1, 3], KeepLayers(kind="layers", layers=(1, 3))),
        ([], KeepLayers(kind="layers")),
        ({"kind": "layers", "layers": [2]}, KeepLayers(kind="layers", layers=(2,))),
        ({"kind": "every", "step": 2}, KeepEvery(kind="every", step=2)),
        ({"kind": "paper"}, KeepPaper(kind="paper")),
        (
            IMPORTANT | {"rows": 2, "length": 64},
            KeepImportant(kind="important", count=1, data=STAGE["data"], rows=2, length=64),
        ),
    ],
    ids=str,
)
def test_layers_that_stay_attention(tmp_path: Path, given: Any, wanted: Keep) -> None:
    """The same from a file, as an argument over another form, and written down by the run."""
    path = write(tmp_path / "a.yaml", changed(HYBRID, "student.keep_attention", given))
    other = write(tmp_path / "b.yaml", changed(HYBRID, "student.keep_attention", [0]))
    argument = f"student.keep_attention={yaml.safe_dump(given, default_flow_style=True)}"
    for sources in ([path], [other, argument]):
        read = recipe.load(DistillRecipe, sources)
        assert read.student.keep_attention == wanted
        assert DistillRecipe.model_validate_json(read.model_dump_json()) == read


def test_no_layer_stays_attention_unless_asked() -> None:
    read = recipe.parse(DistillRecipe, HYBRID)
    assert read.student == Transplanted(start="transplant")
    assert read.student.keep_attention == KeepLayers(kind="layers", layers=())
    assert (read.student.mixer, read.student.initial) == ("mamba2", "attention")


FORMS = "must be a list of layers, or a mapping such as {kind: every, step: 4}"
KINDS = "choose 'layers', 'every', 'paper', 'important'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", f": {FORMS}, not 3"),
        ("paper", f": {FORMS}, not 'paper'"),
        ("'1,3'", f": {FORMS}, not '1,3'"),
        ("null", f": {FORMS}, not None"),
        ("[1, x]", ".layers.1: input should be a valid integer"),
        ("[-1]", ".layers.0: input should be greater than or equal to 0, not -1"),
        ("{kind: layers, layers: 3}", ".layers: must be a list, not 3"),
        ("{step: 2}", f": kind is missing, {KINDS}"),
        ("{kind: evry}", f": kind 'evry' is not known, {KINDS}"),
        ("{kind: every}", ".step: missing, and it has no default"),
        ("{kind: every, step: 0}", ".step: input should be greater than 0, not 0"),
        ("{kind: every, stp: 2, step: 2}", ".stp: unknown key, did you mean 'step'?"),
        ("{kind: paper, layers: [1]}", ".layers: unknown key, known here: kind"),
        ("{kind: important, count: 1}", ".data: missing, and it has no default"),
        (
            "{kind: important, count: 1, data: {kind: txt}}",
            ".data: kind 'txt' is not known, choose 'worked', 'text'",
        ),
        (
            "{kind: important, count: 1, data: {kind: text, path: a, colum: b}}",
            ".data.colum: unknown key, did you mean 'column'?",
        ),
    ],
)
def test_wrong_forms_of_kept_layers(tmp_path: Path, text: str, message: str) -> None:
    """One line in a user's words, from the command line and from a file."""
    path = write(tmp_path / "a.yaml", HYBRID)
    assert refusal(path, f"student.keep_attention={text}").startswith(
        f"student.keep_attention{message}"
    )
    values = changed(HYBRID, "student.keep_attention", yaml.safe_load(text))
    assert refusal(write(path, values)).startswith(f"student.keep_attention{message}")


def test_mamba1_has_no_matrices_to_match() -> None:
    stages = [STAGE, STAGE | {"name": "two", "objective": {"kind": "mixing_matrices"}}]
    wrong = changed(HYBRID, "student.mixer", "mamba1") | {"stages": stages}
    (found,) = mistakes(wrong)
    assert found.startswith("stages.1.objective: mamba1 has no mixing matrices to match; leave")
    for kind in ("mamba2", "discrete_mamba2"):
        recipe.parse(DistillRecipe, changed(wrong, "student.mixer", kind))


def test_only_discrete_mixers_start_as_the_identity() -> None:
    wrong = changed(HYBRID, "student.initial", "identity")
    for kind in ("mamba2", "mamba1"):
        (found,) = mistakes(changed(wrong, "student.mixer", kind))
        assert found.startswith(f"student.initial: {kind} cannot start as the identity")
    recipe.parse(DistillRecipe, changed(wrong, "student.mixer", "discrete_mamba2"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv_width": 1}, "conv_width: input should be greater than or equal to 2, not 1"),
        ({"state_size": 0}, "state_size: input should be greater than 0, not 0"),
        ({"headdim": 8}, "headdim: unknown key, did you mean 'head_dim'?"),
    ],
)
def test_mistakes_in_mixer_settings(settings: Values, message: str) -> None:
    (found,) = mistakes(changed(HYBRID, "student.settings", settings))
    assert found.startswith(f"student.settings.{message}")


def test_unknown_mixers_list_the_known_ones() -> None:
    (found,) = mistakes(changed(HYBRID, "student.mixer", "mamba3"))
    assert found == (
        "student.mixer: input should be 'mamba2', 'discrete_mamba2' or 'mamba1', not 'mamba3'"
    )


# ---------------------------------------------------------------- bundled recipes

BUNDLED = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_bundled_recipes_are_right(path: Path) -> None:
    """A recipe for sampling may leave the model and the run's folder to the command line, and one
    that is laid over others the problems to them.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "stages" in content:
        recipe.load(DistillRecipe, [path])
    else:
        rest = [] if "problems" in content else ["problems.kind=gsm8k"]
        recipe.load(SampleRecipe, [path, "out=runs/sample", "model=bundled", *rest])


def test_recipes_are_bundled() -> None:
    assert RECIPES / "demo" / "teacher.yaml" in BUNDLED


def test_a_bundled_recipe_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no file of that name; one that is here comes first."""
    monkeypatch.chdir(tmp_path)
    bundled = recipe.load(DistillRecipe, ["demo/pure.yaml"])
    assert bundled == recipe.load(DistillRecipe, [RECIPES / "demo" / "pure.yaml"])
    (tmp_path / "demo").mkdir()
    text = (RECIPES / "demo" / "pure.yaml").read_text()
    (tmp_path / "demo" / "pure.yaml").write_text(text.replace("out: runs/pure", "out: elsewhere"))
    assert recipe.load(DistillRecipe, ["demo/pure.yaml"]).out == Path("elsewhere")
