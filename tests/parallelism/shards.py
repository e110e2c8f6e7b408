"""Parameters cut by hand, as the engines cut them: no hooks, no training."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.flat import ShardedBucket, mark_shard


def cut_whole(parameters: list[nn.Parameter], mesh: DeviceMesh) -> ShardedBucket:
    """Mark parameters that stay whole, as stages 1 and 2 do; gradients go to shards."""
    bucket = ShardedBucket([p.shape for p in parameters], mesh)
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    own = flat[bucket.own].clone()
    shards = bucket.attach(own, [p.requires_grad for p in parameters])
    for parameter, shard in zip(parameters, shards, strict=True):
        mark_shard(parameter, shard)
        if parameter.grad is not None:
            piece = parameter.grad.reshape(-1)[shard.start : shard.stop]
            shard.local.grad = piece.clone()
            parameter.grad = None
    return bucket


def cut_in_place(model: nn.Module, mesh: DeviceMesh) -> ShardedBucket:
    """Replace the parameters of a model by their slices, as stage 3 does."""
    parameters = list(model.parameters())
    bucket = cut_whole(parameters, mesh)
    local = {id(p): s.local for p, s in zip(parameters, bucket.shards, strict=True)}
    for shard in bucket.shards:
        mark_shard(shard.local, shard)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = local[id(parameter)]
    return bucket
