"""How models are spread over the processes of a run: one code path, however many there are.

Order matters: load, drop activations, compile each block, shard (FSDP2), and only then make the
optimiser, whose moments are then sharded as the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from retort.data.packing import Batch
from retort.model import weights
from retort.model.decoder import Decoder
from retort.model.weights import RATES
from retort.recipe import HiddenStates, MixingMatrices, Objective, Parallel
from retort.train.objectives import Loss, evaluate, teach
from retort.train.world import World, compute_dtype

# What `selective` keeps: products with weights, and attention; the rest is cheap to make again.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


# ---------------------------------------------------------------- models


class Trained(nn.Module):
    """A student behind the one forward that its loss is.

    FSDP gathers what belongs to no block, such as the head, around the forward of its root, and the
    objectives use a decoder in more ways than its own forward.
    """

    def __init__(self, student: Decoder, recompute: bool, sharded: bool) -> None:
        super().__init__()
        self.student, self.recompute, self.sharded = student, recompute, sharded

    def forward(self, teacher: Decoder | None, batch: Batch, objective: Objective) -> Loss:
        """The loss of a batch under an objective."""
        if self.sharded and isinstance(objective, MixingMatrices | HiddenStates):
            assert teacher is not None
            taught = batch.taught or teach(teacher, batch, objective).taught
            batch = batch._replace(taught=tuple(_noticed(h_BTD) for h_BTD in taught))
        return evaluate(self.student, teacher, batch, objective, self.recompute)


def _noticed(h_BTD: Tensor) -> Tensor:
    """What a block reads, with a gradient that nobody keeps: FSDP frees a block's weights in the
    backward pass, and reduces their gradients, once that of its input has been computed. Without
    one it does so for all blocks at the end.
    """
    leaf_BTD = h_BTD.detach().requires_grad_()
    leaf_BTD.register_post_accumulate_grad_hook(_forget)
    return leaf_BTD


def _forget(tensor: Tensor) -> None:
    tensor.grad = None


def spread_student(student: Decoder, world: World, settings: Parallel) -> Trained:
    """The student in float32, ready to be trained by all processes, as the main one has it.

    Other processes give a decoder without weights. What is computed in another dtype is cast for
    each use; the rates of the mixers (A_log, dt_bias, D) never are. They are few, and whole on
    every process.
    """
    cast(student, torch.float32)
    _wrap_blocks(student, settings)
    trained = Trained(student, settings.recompute != "none", world.mesh is not None)
    if world.mesh is None:
        student.to(world.device)
        return trained
    policy = MixedPrecisionPolicy(compute_dtype(world.device, settings), torch.float32)
    _shard(trained, student, world, policy)
    return trained


def spread_teacher(teacher: Decoder, world: World, settings: Parallel) -> Decoder:
    """The teacher, to be used without gradients by all processes, as the main one has it."""
    cast(teacher, compute_dtype(world.device, settings))
    teacher.requires_grad_(False)
    if world.mesh is None:
        return teacher.to(world.device)
    _shard(teacher, teacher, world, MixedPrecisionPolicy())
    for method in ("hidden", "hidden_states"):
        register_fsdp_forward_method(teacher, method)
    return teacher


def note_trained(trained: nn.Module) -> None:
    """Tells FSDP that other parameters are trained from here on: it takes the dtype of a block's
    gradients from them, and looks only when it gathers weights out of turn.
    """
    for module in trained.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def whole(student: Decoder, world: World, dtype: torch.dtype) -> Decoder:
    """A decoder with all of the student's weights on this process's device, for generating text:
    its blocks are plain. Weights that are whole here already, in that dtype, are shared.

    All processes must call it, as they must the next one.
    """
    return _assembled(student, _gathered(student, dtype, world.device))


def whole_on_main(student: Decoder, world: World, dtype: torch.dtype) -> Decoder | None:
    """The main process's decoder with all of the student's weights, on its CPU."""
    if world.main:
        return _assembled(student, _gathered(student, dtype, torch.device("cpu")))
    for tensor in student.state_dict().values():
        full(tensor)
    return None


def _gathered(student: Decoder, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The student's tensors as `cast` leaves them; one at a time is whole in float32."""
    return {
        name: full(tensor).to(device, torch.float32 if name.endswith(RATES) else dtype)
        for name, tensor in student.state_dict().items()
    }


def _assembled(student: Decoder, tensors: dict[str, Tensor]) -> Decoder:
    decoder = weights.empty(student.config)
    decoder.load_state_dict(tensors, assign=True)
    tie(decoder)
    return decoder.eval().requires_grad_(False)


def full(tensor: Tensor) -> Tensor:
    """A tensor with all its parts. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cast(decoder: Decoder, dtype: torch.dtype) -> None:
    """Casts all parameters but the rates of mixers, which are in float32 whatever the rest is."""
    for name, parameter in decoder.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.endswith(RATES) else dtype)


def _wrap_blocks(student: Decoder, settings: Parallel) -> None:
    """Has blocks drop activations and run compiled, as asked for."""
    for block in student.blocks:
        forward: Callable[..., Any] = block.forward
        if settings.recompute == "full":
            forward = partial(checkpoint, forward, use_reentrant=False)
        elif settings.recompute == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _keep_products)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
        if settings.compile:
            forward = torch.compile(forward)
        block.forward = forward  # type: ignore[method-assign]


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(root: nn.Module, decoder: Decoder, world: World, policy: MixedPrecisionPolicy) -> None:
    """Shards a decoder block by block, so that no process ever holds more than one block whole."""
    for block in decoder.blocks:
        _receive(block, world)
        fully_shard(block, mesh=world.mesh, mp_policy=policy, ignored_params=_rates(block))
        for method in ("mix", "mixing_matrix"):
            register_fsdp_forward_method(block, method)
    for module in (decoder.model.embed_tokens, decoder.model.norm, decoder.lm_head):
        if not (module is decoder.lm_head and decoder.config.tie_embeddings):
            _receive(module, world)
    tie(decoder)
    fully_shard(root, mesh=world.mesh, mp_policy=policy, ignored_params=_rates(decoder))


def _receive(module: nn.Module, world: World) -> None:
    """Fills a module on this process's device with what the main process has."""
    if world.main:
        module.to(world.device)
    else:
        module.to_empty(device=world.device)
    for parameter in module.parameters():
        dist.broadcast(parameter.data, src=0)


def tie(decoder: Decoder) -> None:
    if decoder.config.tie_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight


def _rates(module: nn.Module) -> set[nn.Parameter]:
    return {p for name, p in module.named_parameters() if f".{name}".endswith(RATES)}


# ---------------------------------------------------------------- gradients


def clip(named: Mapping[str, nn.Parameter], limit: float, world: World) -> float:
    """Makes gradients the same on all processes, clips their common norm, and returns the norm."""
    parts, wholes = sharded_and_whole(named)
    if world.size > 1:
        for parameter in wholes:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world.size)  # as FSDP does with all others
    groups = [group for group in (parts, wholes) if group]
    norms = [
        full(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in groups
    ]
    norm = torch.linalg.vector_norm(torch.stack([each.to(world.device) for each in norms]))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return float(norm)


def sharded_and_whole(
    named: Mapping[str, nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of which each process has a part, and those of which it has all; most operations
    on many tensors at once refuse to mix the two.
    """
    sharded = {name for name, p in named.items() if isinstance(p, DTensor)}
    parts = [p for name, p in named.items() if name in sharded]
    return parts, [p for name, p in named.items() if name not in sharded]
