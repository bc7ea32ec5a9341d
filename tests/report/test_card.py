import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

import retort
from retort.recipe import BUNDLED_TEACHER, RECIPES, DistillRecipe, load, parse
from retort.report.build import build
from retort.report.card import HYBRID, Card, find_recipe, write
from retort.report.curves import Curves
from retort.report.tally import tally
from retort.store import Run
from retort.train.folder import identity

MakeRun = Callable[..., Run]

HOME = "/home/alice/secret"
HOSTILE = [
    "x\n---\nlicense: evil\n---\n# Heading",
    "``` ````\n```\n<script>alert(1)</script>",
    "x\n```\n# Heading\n````\n- item",
    "<script>alert(1)</script> &lt;img src=x onerror=y> <!-- ",
    "a | b || \\| c \\",
    "*b* _i_ ~~s~~ `c` [l](http://evil) ![i](x) <http://evil> $x$ www.evil.com \\",
    "{a: &b !!python/object [c], 'd', \"e\": *b} # no %TAG @",
    "turned \u202e round\u2028\u2029\x85\x00\x1b[31m \ufeff\u200b end",
]


class Document:
    """What a reader of the card sees, by a Markdown parser that lets HTML through."""

    def __init__(self, text: str) -> None:
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        assert match is not None
        self.front = yaml.safe_load(match[1])
        parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
        self.blocks = parser.parse(text[match.end() :])
        self.fences = [block.content for block in self.blocks if block.type == "fence"]
        inline = [block for block in self.blocks if block.type == "inline"]
        self.lines = [shown(block) for block in inline]
        kinds = [token.type for block in inline for token in block.children or ()]
        self.markup = {*kinds, *(block.type for block in self.blocks)}

    def section(self, title: str) -> list[str]:
        """The texts of its paragraphs, items and cells."""
        places = [i for i, block in enumerate(self.blocks) if block.type == "heading_open"]
        starts = {shown(self.blocks[i + 1]): i for i in places}
        if title not in starts:
            return []
        end = min([i for i in places if i > starts[title]], default=None)
        blocks = self.blocks[starts[title] + 2 : end]
        return [shown(block) for block in blocks if block.type == "inline"]

    def rows(self, title: str, columns: int) -> list[list[str]]:
        """A section's table, its head too; the cells that are not the table's are cut off."""
        cells = [text for text in self.section(title) if not text.endswith((":", "."))]
        assert len(cells) % columns == 0
        return [cells[i : i + columns] for i in range(0, len(cells), columns)]


def shown(block: Token) -> str:
    return "".join(token.content for token in block.children or ())


def recipe(**changes: Any) -> DistillRecipe:
    data = {
        "kind": "worked",
        "problems": {"kind": "jsonl", "path": f"{HOME}/data/train.jsonl"},
        "prompt": "Line one\nof {question}",
    }
    stage = {"tokens": 2_000_000, "rows": 4, "length": 256, "optim": {"lr": 3e-4}}
    values = {
        "out": f"{HOME}/models/student",
        "teacher": f"{HOME}/models/teacher",
        "student": {"start": "transplant", "source": f"{HOME}/half", "keep_attention": [1]},
        "stages": [
            stage | {"name": "hidden", "objective": {"kind": "hidden_states"}, "data": data},
            stage
            | {
                "name": "distill",
                "objective": {"kind": "distill", "direction": "reverse"},
                "data": {"kind": "text", "path": f"{HOME}/data/corpus.jsonl"},
                "tokens": 600_000,
                "length": 512,
            },
        ],
    }
    return parse(DistillRecipe, values | changes)


@pytest.fixture(scope="module")
def curves(make_run: MakeRun) -> Curves:
    outcomes = {f"p{i}": ["42", "7", None, "42"] for i in range(5)}
    runs = [make_run(name, outcomes) for name in ("student", "teacher", "other")]
    made = build([tally(run, "1") for run in runs])
    problems = {"kind": "gsm8k", "path": f"{HOME}/test.jsonl", "split": "test"}
    models = [replace(model, recipe={"problems": problems}) for model in made.models]
    return replace(made, models=tuple(models))


@pytest.fixture
def full(curves: Curves) -> Card:
    return Card(
        title="student",
        architecture=HYBRID,
        layers=[("parameters", "1.2 B"), ("layers", "16: attention in 3")],
        base_model="meta-llama/Llama-3.2-1B-Instruct",
        license="Apache-2.0",
        recipe=recipe(),
        curves=curves,
    )


def test_front_matter(full: Card) -> None:
    assert Document(write(full)).front == {
        "license": "apache-2.0",
        "base_model": "meta-llama/Llama-3.2-1B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["retort", "mamba2", "distillation"],
    }


def test_sections_of_a_full_card(full: Card) -> None:
    text = write(full)
    card = Document(text)
    assert card.lines[:3] == [
        "student",
        "A language model with Mamba-2 layers, distilled from meta-llama/Llama-3.2-1B-Instruct "
        "with Retort.",
        "License: Apache-2.0.",
    ]
    assert card.rows("Architecture", 2) == [
        ["what", "value"],
        ["parameters", "1.2 B"],
        ["layers", "16: attention in 3"],
    ]
    assert card.rows("Training", 6)[1:] == [
        [
            "hidden",
            "hidden_states (block)",
            "jsonl (train.jsonl)",
            "2,000,000",
            "4 × 256",
            "0.0003",
        ],
        ["distill", "distill (reverse)", "text (corpus.jsonl)", "600,000", "4 × 512", "0.0003"],
    ]
    assert "Trained on 2.6 M tokens in 2 stages:" in card.lines
    assert any("at most 512 tokens" in line for line in card.section("Limitations"))
    assert card.section("How it was made")[0].endswith(f"by Retort {retort.__version__}.")
    assert "http" not in text


def test_results_are_of_the_model_and_its_teacher(full: Card) -> None:
    card = Document(write(full))
    head, *rows = card.rows("Results", 4)
    assert head == ["model", "k", "coverage", "majority"]
    names = ["student (this model)"] * 3 + ["teacher (teacher)"] * 3
    assert [row[:2] for row in rows] == [[n, k] for n, k in zip(names, "124124", strict=True)]
    assert rows[0][2].replace("\N{NARROW NO-BREAK SPACE}", " ").startswith("50 % (")
    assert card.section("Results")[0] == (
        f"On 5 problems of gsm8k (test.jsonl), measured with Retort {retort.__version__}:"
    )
    assert "not another training run" in card.section("Results")[-1]


def test_results_are_of_all_models_when_this_one_is_not_known(full: Card) -> None:
    card = Document(write(replace(full, title="renamed", recipe=None)))
    rows = card.rows("Results", 4)[1:]
    assert [row[0] for row in rows[::3]] == ["student", "teacher", "other"]


def test_a_model_is_known_by_the_folder_that_was_sampled(full: Card, curves: Curves) -> None:
    sampled = replace(curves.models[2], recipe={"model": "exports/renamed"})
    curves = replace(curves, models=(*curves.models[:2], sampled))
    card = Document(write(replace(full, title="renamed", recipe=None, curves=curves)))
    assert [row[0] for row in card.rows("Results", 4)[1:]] == ["other (this model)"] * 3


def test_minimal_card_leaves_out_what_is_not_known() -> None:
    card = Document(write(Card("tiny", "LlamaForCausalLM")))
    assert card.front.keys() == {"library_name", "pipeline_tag", "tags"}
    assert card.front["tags"] == ["retort"]
    assert card.lines[1:3] == [
        "A language model, made with Retort.",
        "No license is stated here.",
    ]
    for title in ("Architecture", "Training", "Results"):
        assert card.section(title) == []
    assert card.section("Limitations") == ["No results came with it."]


def test_terms_of_the_teacher_apply_without_a_license() -> None:
    card = Document(write(Card("tiny", HYBRID, base_model="someone/model")))
    assert card.lines[2] == "No license is stated here. The terms of someone/model apply."


@pytest.mark.parametrize("chat", [True, False])
def test_how_to_run_it(chat: bool) -> None:
    python, shell = Document(write(Card("tiny", HYBRID, chat=chat))).fences
    compile(python, "card", "exec")
    assert 'padding_side="left"' in python
    assert ("apply_chat_template" in python) == chat
    assert shell.splitlines() == [
        "vllm serve PATH",
        "python -m sglang.launch_server --model-path PATH",
    ]


def test_only_runtimes_that_read_it_are_named() -> None:
    card = Document(write(Card("tiny", HYBRID, runtimes=["transformers", "llama.cpp"])))
    assert "for transformers and llama.cpp." in card.section("How to run it")[0]
    assert card.fences[1] == "python convert_hf_to_gguf.py PATH\n"
    assert Document(write(Card("tiny", HYBRID, runtimes=[]))).section("How to run it") == []


@pytest.mark.parametrize(
    ("problems", "datasets"),
    [
        ({"kind": "gsm8k", "split": "train"}, ["openai/gsm8k"]),
        ({"kind": "math500"}, ["HuggingFaceH4/MATH-500"]),
        ({"kind": "gsm8k", "path": "gsm8k.jsonl"}, None),
        ({"kind": "arithmetic"}, None),
    ],
)
def test_datasets_are_those_of_the_hub(problems: dict[str, str], datasets: list[str]) -> None:
    stage = recipe().stages[0].model_dump() | {"data": {"kind": "worked", "problems": problems}}
    front = Document(
        write(Card("tiny", HYBRID, recipe=recipe(stages=[stage, stage | {"name": "b"}])))
    )
    assert front.front.get("datasets") == datasets


@pytest.mark.parametrize("name", ["hybrid.yaml", "demo/pure.yaml", "demo/teacher.yaml"])
def test_recipe_can_be_used_again(name: str) -> None:
    original = load(DistillRecipe, [RECIPES / name])
    shown = yaml.safe_load(Document(write(Card("tiny", HYBRID, recipe=original))).fences[2])
    again = parse(DistillRecipe, shown)
    assert again.out == Path(original.out.name)
    assert (again.student, again.seed) == (original.student, original.seed)
    assert [s.model_dump(exclude={"data"}) for s in again.stages] == [
        s.model_dump(exclude={"data"}) for s in original.stages
    ]
    if original.teacher == BUNDLED_TEACHER:
        assert shown["teacher"] == "bundled"


def test_a_teacher_made_from_nothing_is_not_distilled() -> None:
    original = load(DistillRecipe, [RECIPES / "demo" / "teacher.yaml"])
    card = Document(write(Card("tiny", "LlamaForCausalLM", recipe=original)))
    assert card.lines[1] == "A language model, made with Retort."
    assert card.front["tags"] == ["retort"]


@pytest.mark.parametrize(
    "base", [f"{HOME}/models/teacher", f"~{HOME}/teacher/", r"C:\secret\alice\teacher", None]
)
def test_no_folder_of_this_machine_is_told(full: Card, base: str | None) -> None:
    text = write(replace(full, base_model=base))
    assert "alice" not in text
    assert "secret" not in text
    assert "base_model" not in Document(text).front  # the hub has another `teacher`, if any
    assert "distilled from teacher with" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_elsewhere_stays_text(full: Card, curves: Curves, text: str) -> None:
    file = re.sub(r"[\\/]", "", text) + ".jsonl"
    data = {"kind": "worked", "problems": {"kind": "jsonl", "path": f"{HOME}/{file}"}}
    stage = recipe().stages[0].model_dump() | {"data": data | {"prompt": text + "{question}"}}
    named = replace(curves.models[0], name=text, recipe={"problems": {"kind": text}})
    written = write(
        Card(
            title=text,
            architecture=text,
            layers=[(text, text), (text, text)],
            base_model=text,
            license=text,
            recipe=recipe(stages=[stage], out=file, teacher=file),
            curves=replace(curves, retort=text, models=(named, curves.models[1])),
            runtimes=("transformers", text),
        )
    )
    plain, card, expected = Document(write(full)), Document(written), seen(text)
    assert card.markup <= plain.markup
    assert card.front["license"] == expected.lower()
    assert "base_model" not in card.front
    assert card.lines[0] == expected
    assert card.lines[2] == f"License: {expected}."
    assert card.rows("Architecture", 2)[1:] == [[expected, expected]] * 2
    assert len(card.rows("Training", 6)) == 2
    assert card.rows("Training", 6)[1][2] == f"jsonl ({seen(file)})"
    assert card.rows("Results", 4)[1][0] == f"{expected} (this model)"
    (shown,) = yaml.safe_load(card.fences[-1])["stages"]
    assert shown["data"]["prompt"] == text + "{question}"
    assert "<" not in written
    assert not re.search("[\u202e\u2028\u2029\x85\x00\x1b\ufeff\u200b]", written)
    written.encode()


def seen(text: str) -> str:
    """What is left of a text on one line."""
    return " ".join(re.sub("[\u202e\u2028\u2029\x85\x00\x1b\ufeff\u200b]", " ", text).split())


def test_unpaired_surrogates_can_be_written() -> None:
    write(Card("a\ud800b", "b\udcff", license="c\udcff", base_model="d\udcff")).encode()


def test_bare_addresses_are_no_links() -> None:
    text = write(Card("https://evil.com and WWW.evil.com, a@evil.com", HYBRID))
    assert r"https\://evil.com and WWW\.evil.com, a\@evil.com" in text


def finished(folder: Path, text: str) -> Path:
    work = folder.with_name(f"{folder.name}.training")
    work.mkdir()
    (work / "recipe.json").write_text(text)
    (work / "finished").touch()
    return folder


def test_recipe_of_a_finished_distillation_is_found(tmp_path: Path) -> None:
    """As a run leaves it, which may be moved."""
    ours = recipe(out=str(tmp_path / "student"))
    folder = finished(tmp_path / "student", identity(recipe(out="elsewhere")))
    assert find_recipe(folder) == ours
    assert find_recipe(tmp_path / "other") is None
    (tmp_path / "student.training" / "finished").unlink()
    assert find_recipe(folder) is None


def test_recipe_is_found_from_inside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(tmp_path / "student", identity(recipe()))
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert find_recipe(Path()) == recipe(out=str(folder))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ('{"out": ', "Expecting value"),
        ("[]", "recipe"),
        ("[" * 100_000, "recursion"),
        (json.dumps({"out": "x", "stages": [], "lr": 1}), "student: missing.*; lr: unknown key"),
    ],
)
def test_damaged_recipe_says_where_and_why(tmp_path: Path, text: str, why: str) -> None:
    folder = finished(tmp_path / "student", text)
    with pytest.raises(ValueError, match=f"student.training.recipe.json: not the recipe .*{why}"):
        find_recipe(folder)
