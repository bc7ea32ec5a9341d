"""Run by torchrun on two processes: what sharded steps give, beside what one process gives.

Writes a JSON object of names and relative errors to the file it is given.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retort import recipe as recipes
from retort.data.packing import Batch
from retort.model import weights
from retort.model.config import ATTENTION, LINEAR, DecoderConfig
from retort.model.decoder import Decoder
from retort.model.transplant import transplant
from retort.recipe import Guard, Parallel, Stage
from retort.train.checkpoint import Checkpoints, folder, read
from retort.train.parallel import full, note_trained, spread_student, spread_teacher, whole
from retort.train.state import Progress, State
from retort.train.step import Stepper
from retort.train.world import World, open_world

KINDS = ("mixing_matrices", "hidden_states", "distill", "supervised")
SETTINGS = {
    "sharded": {},
    "copied": {"shard": 1},
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
}
STEPS = 2
OPTIM = {"lr": 1e-2, "warmup": 0.0, "decay": 0.0, "clip": 0.5}


def models(mixer: str, tied: bool) -> tuple[Decoder, Decoder]:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        layer_types=(ATTENTION,) * 2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        tie_embeddings=tied,
    )
    teacher = Decoder(config)
    teacher.reset_parameters()
    student = transplant(teacher, [LINEAR, ATTENTION], mixer, chunk_size=8)
    return student, teacher


def uneven_batch(step: int) -> Batch:
    """Four rows, of which the first two, those of one process, have next to nothing to learn."""
    generator = torch.Generator().manual_seed(step)
    ids_BT = torch.randint(61, (4, 24), generator=generator)
    document_BT = torch.zeros(4, 24, dtype=torch.long)
    document_BT[:, 10:] = 1
    document_BT[3, 17:] = -1
    learn_BT = torch.zeros(4, 24, dtype=torch.bool)
    for row, learnt in enumerate([0, 1, 23, 9]):
        learn_BT[row, :learnt] = True
    return Batch(ids_BT, document_BT, learn_BT & (document_BT >= 0))


def stage(kind: str) -> Stage:
    values = {
        "name": kind,
        "objective": {"kind": kind},
        "data": {"kind": "worked", "problems": {"kind": "arithmetic"}},
        "tokens": 4 * 24 * 10,
        "rows": 4,
        "length": 24,
        "micro_rows": 1,
        "optim": OPTIM,
    }
    return recipes.parse(Stage, values)


def stepper(mixer: str, kind: str, world: World, tied: bool, **settings: Any) -> Stepper:
    student, teacher = models(mixer, tied)
    if not world.main:  # as it is for all but the main process
        student, teacher = weights.empty(student.config), weights.empty(teacher.config)
    parallel = Parallel(**settings)
    teacher = spread_teacher(teacher, world, parallel)
    trained = spread_student(student, world, parallel)
    state = State(trained.student, Progress())
    state.begin(stage(kind))
    note_trained(trained)
    return Stepper(trained, teacher, state, stage(kind), Guard(), world)


def rows_of(batch: Batch, world: World) -> Batch:
    mine = world.share(4)
    return Batch(*(tensor[mine.start : mine.stop] for tensor in batch[:3]))


def full_tensors(student: Decoder) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in student.state_dict().items()}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """How far apart all tensors together are, over how large they are."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    apart = nn.utils.get_total_norm([found[name] - wanted[name] for name in wanted])
    return float(apart / nn.utils.get_total_norm(list(wanted.values())))


class Found(NamedTuple):
    """What steps give: gradients and means of the first, and weights after the last."""

    gradients: dict[str, Tensor]
    means: dict[str, float]
    weights: dict[str, Tensor]


def steps(made: Stepper, world: World) -> Found:
    means, norm = made._gradients(rows_of(uneven_batch(0), world))
    named = made.state.named
    gradients = {n: full(p.grad).clone() for n, p in named.items() if p.grad is not None}
    made.state.optimizer.zero_grad(set_to_none=True)
    for step in range(STEPS):
        made.take(rows_of(uneven_batch(step), world))
    return Found(gradients, means | {"norm": norm}, full_tensors(made.trained.student))


def alone(mixer: str, kind: str, world: World, tied: bool) -> Found | None:
    """What the main process finds by itself; the others have no need of it."""
    if not world.main:
        return None
    one = replace(world, size=1, mesh=None, rank=0)
    return steps(stepper(mixer, kind, one, tied), one)


def compared(name: str, found: Found, wanted: Found | None) -> Iterator[tuple[str, float]]:
    """The relative errors of gradients and means, and of weights."""
    if wanted is None:
        return
    off = max(abs(found.means[k] - each) / abs(each) for k, each in wanted.means.items())
    yield f"{name} gradients", max(error(found.gradients, wanted.gradients), off)
    yield f"{name} weights", error(found.weights, wanted.weights)


def all_objectives(world: World) -> Iterator[tuple[str, float]]:
    for kind in KINDS:
        found = steps(stepper("mamba2", kind, world, tied=True), world)
        yield from compared(kind, found, alone("mamba2", kind, world, tied=True))
    found = steps(stepper("mamba1", "supervised", world, tied=True), world)
    yield from compared("mamba1", found, alone("mamba1", "supervised", world, tied=True))


def all_settings(world: World) -> Iterator[tuple[str, float]]:
    wanted = alone("discrete_mamba2", "distill", world, tied=False)
    for name, settings in SETTINGS.items():
        mesh = remeshed(world, settings)
        made = stepper("discrete_mamba2", "distill", mesh, tied=False, **settings)
        yield from compared(name, steps(made, mesh), wanted)


def remeshed(world: World, settings: dict[str, Any]) -> World:
    if "shard" not in settings:
        return world
    mesh = torch.distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "part"))
    return replace(world, mesh=mesh)


def bfloat16(world: World) -> Iterator[tuple[str, float]]:
    """Computed in bfloat16: masters and rates in float32, and close to what float32 gives."""
    made = stepper("mamba2", "distill", world, tied=True, dtype="bfloat16")
    dtypes = {p.dtype for p in made.trained.student.parameters()}
    yield "masters in float32", float(dtypes != {torch.float32})
    wanted = alone("mamba2", "distill", world, tied=True)
    yield from compared("bfloat16", steps(made, world), wanted)
    dtypes = {
        n: p.dtype for n, p in whole(made.trained.student, world, torch.bfloat16).named_parameters()
    }
    rates = {dtype for name, dtype in dtypes.items() if name.endswith(("A_log", "dt_bias", ".D"))}
    rest = {
        dtype for name, dtype in dtypes.items() if not name.endswith(("A_log", "dt_bias", ".D"))
    }
    yield "rates in float32", float(rates != {torch.float32} or rest != {torch.bfloat16})


def states(world: World, root: Path) -> Iterator[tuple[str, float]]:
    """A state written by two processes, read by one and by two others."""
    one = replace(world, size=1, mesh=None, rank=0)
    made = stepper("mamba2", "distill", world, tied=True)
    made.take(rows_of(uneven_batch(0), world))
    kept = Checkpoints(root, 2, world)
    kept.save(1, made.state.tensors(), made.state.values())
    made.take(rows_of(uneven_batch(1), world))  # while it is being written
    kept.finish()
    for name, where in (("two", world), ("one", one)):
        again = stepper("mamba2", "distill", where, tied=True)
        read(folder(root, 1), again.state.tensors(), where)
        again.state.progress.updates = 1
        again.state.restored()
        again.take(rows_of(uneven_batch(1), where) if name == "two" else uneven_batch(1))
        wanted = full_tensors(made.trained.student)
        yield f"resumed by {name}", error(full_tensors(again.trained.student), wanted)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with open_world("cpu", Parallel()) as world:
        for checks in (all_objectives(world), all_settings(world), bfloat16(world)):
            found |= dict(checks)
        found |= dict(states(world, out.with_name("states")))
        if world.main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
