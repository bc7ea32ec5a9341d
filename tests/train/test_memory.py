"""The fullest moment of a step: the plan against the bytes that a real step allocates."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from retort.data.packing import Batch
from retort.model.config import Mamba1Config
from retort.model.decoder import Decoder
from retort.recipe import Objective, Parallel, Stage, parse
from retort.train.memory import Setup, memory, sizes
from retort.train.objectives import evaluate, trainable
from retort.train.parallel import open_world, spread_student

MakeDecoder = Callable[..., Decoder]

ROWS, LENGTH = 2, 64
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "heads": 8,
    "kv_heads": 4,
    "tie_embeddings": True,
}
ALONE = Setup(shard=1, sharded=False, size=4, recompute="none")
GIB = 2**30


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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    found = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"]
    held = most = 0
    for _, _, size in sorted(found):
        held += size
        most = max(most, held)
    return most


def wide(make_decoder: MakeDecoder, layers: str) -> Decoder:
    from dataclasses import replace

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
        student = spread_student(student, world, settings).student
    ids_BT = torch.randint(61, (ROWS, LENGTH))
    document_BT = (torch.arange(LENGTH) // 40).expand(ROWS, -1).contiguous()
    batch = Batch(ids_BT, document_BT, document_BT >= 0)
    return peak(lambda: evaluate(student, teacher, batch, objective).sum.backward())


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
    make_decoder: MakeDecoder, kind: str, changes: dict[str, Any], layers: str, recompute: Any
) -> None:
    student, teacher = wide(make_decoder, layers), wide(make_decoder, "aaaa")
    what = stage(kind, **changes)
    trained = sizes(student, trainable(student, what.objective))
    setup = Setup(shard=1, sharded=False, size=4, recompute=recompute)
    plan = memory(what, ROWS, 1, student, trained, teacher, setup)
    transient = plan.gradients + plan.activations + plan.logits
    found = step_peak(student, teacher, what.objective, recompute)
    print(kind, layers, recompute, transient / found, plan)
    assert transient == pytest.approx(found, rel=0.12)
