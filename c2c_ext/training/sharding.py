"""The frozen models' layers spread over the processes that train a fuser."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .model import C2CTrainingModel
from .recomputation import decoder_layers


def shard_frozen_models(model: C2CTrainingModel) -> None:
    """Leaves each process a part of every decoder layer of both models; a layer is gathered to run.

    Embeddings, heads and the fuser stay whole in every process; the fuser's gradients are averaged
    as without sharding. To be called before the model is given to a trainer, with the default
    process group there. Layers move to the process's GPU, or stay where they are on the CPU. Does
    nothing to layers that are sharded already.

    Raises:
        RuntimeError: there is no process group.
        ValueError: a model whose decoder layers are not to be found.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "c2c_ext.training: shard_frozen_models needs several processes: start them by torchrun"
        )
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for frozen in (model.receiver, model.sharer):
        # Each layer by itself and not the model: prefills enter by the base model, tied weights
        # belong to two modules.
        for layer in decoder_layers(frozen):
            if not isinstance(layer, FSDPModule):
                fully_shard(layer, mesh=mesh)
    # DDP would broadcast every parameter at its start, and cannot those that are sharded.
    names = [
        name
        for name, _ in (*model.named_parameters(), *model.named_buffers())
        if not name.startswith("fuser.")
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
