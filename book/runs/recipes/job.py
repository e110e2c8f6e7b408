"""The job that every recipe starts: data-parallel training, on any launcher."""

import json
import os

import torch

import labpkg as lab


def train(steps: int = 20) -> dict[str, float]:
    """Train on all ranks of the job; return the same numbers on each of them."""
    mesh = lab.make_mesh(dp=int(os.environ.get("WORLD_SIZE", "1")))["dp"]
    torch.manual_seed(0)
    model = lab.DataParallel(lab.MLP(64, 32, 10).double(), mesh)
    optimizer = lab.SGD(model.parameters(), lr=0.5)
    settings = {"global_batch_size": 64, "steps": steps, "seed": 0}
    for x, y in lab.batches(lab.digits(), shard=mesh, **settings):
        loss = lab.cross_entropy(model(x.double()), y)
        (loss * lab.mean_weight(len(y), mesh)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"ranks": mesh.size(), "weights": weights.norm().item()}


if __name__ == "__main__":
    result = train()
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
