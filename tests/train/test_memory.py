"""The fullest moment of a step: the plan against the bytes that a real step allocates."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.plain import only_torch
from torch.profiler import ProfilerActivity, profile

from retort.data.packing import Batch
from retort.model import cost
from retort.model.config import Mamba1Config
from retort.model.decoder import Decoder
from retort.model.geometries import geometry
from retort.model.weights import empty
from retort.recipe import Objective, Parallel, Stage, parse
from retort.train import divergence
from retort.train.memory import (
    LOGITS,
    LOGITS_ALONE,
    LOGITS_MORE,
    Memory,
    Setup,
    Sizes,
    memory,
    sizes,
)
from retort.train.objectives import trainable
from retort.train.parallel import spread_student
from retort.train.world import open_world

MakeDecoder = Callable[..., Decoder]

ROWS, LENGTH = 2, 64
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "heads": 8,
    "kv_heads": 4,
    "tie_embeddings": True,
}


def stage(kind: str, **changes: Any) -> Stage:
    values = {
        "name": "one",
        "objective": {"kind": kind, **changes},
        "data": {"kind": "text", "path": "rows.jsonl"},
        "tokens": 1000,
        "rows": ROWS,
        "length": LENGTH,
        "optim": {"lr": 1e-3},
    }
    return parse(Stage, values)


def peak(work: Callable[[], Any]) -> int:
    """The most bytes that some work holds at once of what it allocates."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        work()
    events = trace.profiler.kineto_results.events()
    found = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"]
    held = most = 0
    for _, _, size in sorted(found):
        held += size
        most = max(most, held)
    return most


def wide(make_decoder: MakeDecoder, layers: str) -> Decoder:
    decoder = make_decoder(layers, **WIDE)
    mixer = decoder.config.mixer
    if mixer is None:
        return decoder
    groups = {} if isinstance(mixer, Mamba1Config) else {"groups": 8}
    settings = {"heads": 8, "chunk_size": 16, "state_size": 8, **groups}
    return make_decoder(layers, **WIDE, mixer=replace(mixer, **settings))


def step_peak(student: Decoder, teacher: Decoder, objective: Objective, recompute: Any) -> int:
    names = trainable(student, objective)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    settings = Parallel(recompute=recompute)
    with open_world("cpu", settings) as world:
        trained = spread_student(student, world, settings)
    ids_BT = torch.randint(61, (ROWS, LENGTH))
    document_BT = (torch.arange(LENGTH) // 40).expand(ROWS, -1).contiguous()
    batch = Batch(ids_BT, document_BT, document_BT >= 0)
    return peak(lambda: trained(teacher, batch, objective).sum.backward())


CASES = [
    ("distill", {}, "mamm", "none"),
    ("distill", {"direction": "reverse"}, "mamm", "full"),
    ("distill", {}, "dddd", "none"),
    ("distill", {}, "ssas", "none"),
    ("distill", {}, "ssas", "selective"),
    ("distill", {}, "mmmm", "full"),
    ("supervised", {}, "dddd", "full"),
    ("hidden_states", {}, "mmmm", "none"),
    ("hidden_states", {}, "dada", "full"),
    ("hidden_states", {"compare": "mixer"}, "mmmm", "none"),
    ("mixing_matrices", {}, "mmmm", "none"),
    ("mixing_matrices", {}, "dddd", "full"),
]


@pytest.mark.parametrize(("kind", "changes", "layers", "recompute"), CASES)
def test_peak_of_a_step(
    make_decoder: MakeDecoder,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changes: dict[str, Any],
    layers: str,
    recompute: Any,
) -> None:
    only_torch(monkeypatch)
    student, teacher = wide(make_decoder, layers), wide(make_decoder, "aaaa")
    what = stage(kind, **changes)
    trained = sizes(student, trainable(student, what.objective))
    setup = Setup(shard=1, sharded=False, size=4, recompute=recompute)
    plan = memory(what, ROWS, 1, student, trained, teacher, setup)
    transient = plan.gradients + plan.activations + plan.logits
    found = step_peak(student, teacher, what.objective, recompute)
    assert found < 1.01 * transient
    assert transient < 1.12 * found


# ------------------------------------------------------------------ on many processes, by hand


def published(kind: str, rows: int, ce_weight: float = 0.0, **setup: Any) -> tuple[Memory, Sizes]:
    student, teacher = empty(geometry("native-1b")), empty(geometry("llama-3.2-1b"))
    what = stage(kind, ce_weight=ce_weight) if ce_weight else stage(kind)
    trained = sizes(student, trainable(student, what.objective))
    values = {"shard": 8, "sharded": True, "size": 2, "recompute": "full"} | setup
    return memory(what, rows, 2, student, trained, teacher, Setup(**values)), sizes(student)


def test_sizes_of_a_student() -> None:
    config = geometry("native-1b")
    parts = cost.parameters(config)
    found = sizes(empty(config))
    assert found.total == parts.total
    assert found.rates == 16 * 3 * 32  # A_log, dt_bias and D of 32 heads in 16 layers
    assert found.root == parts.embedding + parts.norm
    assert found.block == max(block.total for block in parts.blocks)


def test_shares_and_what_is_gathered() -> None:
    plan, whole = published("distill", rows=64)
    share = -(-(whole.total - whole.rates) // 8) + whole.rates
    assert plan.weights == 4 * share
    assert plan.moments == 8 * share
    assert plan.gathered in (2 * (whole.root + n * whole.block) for n in (0, 1, 2))
    theirs = sizes(empty(geometry("llama-3.2-1b")))
    assert plan.teacher == 2 * -(-theirs.total // 8) + 2 * theirs.root


@pytest.mark.parametrize(("ce_weight", "more"), [(0.0, 0), (0.5, LOGITS_MORE)])
def test_logits_are_those_of_a_chunk(ce_weight: float, more: int) -> None:
    """Chunks so large that the loss is the fullest moment of a step."""
    plan, _ = published("distill", rows=64, ce_weight=ce_weight, chunk=2**28)
    vocabulary, width = 128_256, 2048
    tokens = 2**28 // vocabulary
    head, chunks = vocabulary * width, LOGITS["forward"] + more
    assert plan.logits == 4 * chunks * vocabulary * tokens + (2 + 4) * head


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_chunks_of_logits_with_cross_entropy(
    direction: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 2**17)
    tokens, width, vocabulary = 96, 8, 4096
    h_MD, teacher_MD = torch.randn(2, tokens, width)
    head_VD, teacher_VD = torch.randn(2, vocabulary, width)
    h_MD.requires_grad_()
    target_M = torch.zeros(tokens, dtype=torch.long)

    def work() -> None:
        sides = h_MD, head_VD, teacher_MD, teacher_VD
        divergence.distillation_sum(*sides, target_M, 0.5, direction, temperature)[0].backward()

    found = peak(work) / (4 * divergence.CHUNK_ELEMENTS)
    assert found == pytest.approx(LOGITS[direction] + LOGITS_MORE, rel=0.05)


@pytest.mark.parametrize("what", ["forward", "reverse", "jsd", "supervised"])
def test_chunks_of_logits_at_once(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 2**17)
    tokens, width, vocabulary = 96, 8, 4096
    h_MD, teacher_MD = torch.randn(2, tokens, width)
    head_VD, teacher_VD = torch.randn(2, vocabulary, width)
    h_MD.requires_grad_()

    def work() -> None:
        if what == "supervised":
            target_M = torch.zeros(tokens, dtype=torch.long)
            divergence.cross_entropy_sum(h_MD, head_VD, target_M).backward()
        else:
            loss = divergence.divergence_sum(h_MD, head_VD, teacher_MD, teacher_VD, what)
            loss.backward()

    found = peak(work) / (4 * divergence.CHUNK_ELEMENTS)
    planned = LOGITS_ALONE if what == "supervised" else LOGITS[what]
    assert found == pytest.approx(planned, rel=0.05)
