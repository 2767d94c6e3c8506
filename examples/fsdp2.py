"""Two tasks trained by two processes that share the weights of a ViT by FSDP2: ``python examples/fsdp2.py``.

As a plain script it starts two processes on this machine by itself; torchrun starts as many as it is told, and what is
trained goes into the folder that is named: ``torchrun --nproc-per-node=4 examples/fsdp2.py out``. The order of things:
analyse the plain model, each process with its shard of the data; plan; expand; only then shard, block by block; and
make the optimizer last. Every process saves, the first one writes, and one process alone loads what was saved.

Every rank runs all tasks in every step, which is what FSDP2 needs; its loss may be of those that its batch has labels
of, as here, where every third picture has no depth.
"""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dtme

TASKS = ("depth", "edges")
WIDTH, PATCH, SIZE, STEPS = 48, 8, 32, 30


def picture(number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A bright disc before a slope of brightness; per patch how near it is, and how much brightness changes in it."""
    generator = torch.Generator().manual_seed(number)
    x, y, radius, tilt = torch.rand(4, generator=generator).tolist()
    rows, columns = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    disc = ((columns - x).square() + (rows - y).square()).sqrt() < 0.15 + 0.2 * radius
    image = torch.where(disc, 1.0, tilt * rows + (1 - tilt) * columns - 0.5)
    patches = image.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2).flatten(0, 1)
    near = disc.float().unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2).mean(-1).flatten()
    targets = {"edges": patches.std(-1)} | ({} if number % 3 == 2 else {"depth": near})
    return image.expand(3, -1, -1), targets


def batches(rank: int, world: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of four pictures each, all or none of which have labels of a task: every ``world``-th is this rank's."""
    found = []
    for first in range(4):
        for kind in range(3):
            pictures = [picture(kind + 3 * (4 * first + i)) for i in range(4)]
            images, targets = zip(*pictures, strict=True)
            labels = {task: torch.stack([one[task] for one in targets]) for task in targets[0]}
            found.append((torch.stack(images), labels))
    return found[rank::world]


class ViT(nn.Module):
    """Patches of a picture in, as many tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, WIDTH))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, **options) for _ in range(4)))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.embed(images).flatten(2).transpose(1, 2) + self.position)


class Number(nn.Module):
    """One for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens).squeeze(-1)


def parts() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)  # all processes begin with the same weights
    return ViT(), {task: Number() for task in TASKS}


LOSSES = dict.fromkeys(TASKS, F.mse_loss)


def train(model: Any, network: Any, shard: list[Any], steps: int, device: torch.device, lr: float) -> None:
    """Let ``network``, the model or what is wrapped around it, learn; prints the first and the last loss."""
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=lr))
    for step in range(steps):
        images, targets = shard[step % len(shard)]
        predictions = network(images.to(device))
        losses = [LOSSES[task](predictions[task], target.to(device)) for task, target in targets.items()]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            say(f"loss {mean.item():.3f} at step {step}")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main(folder: Path) -> None:
    has_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if has_gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    say(f"{world} processes")
    shard = batches(rank, world)
    model = dtme.MultiTaskModel(*parts()).to(device)

    # the heads learn a little first; DDP has to look for the head of a task that a batch has no labels of
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    train(model, wrapped, shard, STEPS, device, 3e-3)
    report = dtme.analyze(model, shard, LOSSES, progress=False)
    say(str(report))
    dtme.expand(model, report.plan(modulation=0.5, expansion=0.5, num_tokens=4))

    for block in model.backbone.blocks:
        fully_shard(block)
    fully_shard(model)
    train(model, model, shard, STEPS, device, 1e-3)

    images = torch.stack([picture(number)[0] for number in range(100, 104)])
    with torch.no_grad():
        predictions = {task: found.cpu() for task, found in model.eval()(images.to(device)).items()}
    model.save_pretrained(folder)  # every process: what is sharded is gathered on the first
    if rank == 0:
        loaded = dtme.MultiTaskModel.from_pretrained(folder, *parts()).eval()
        with torch.no_grad():
            same = all(torch.allclose(found, predictions[task], atol=1e-5) for task, found in loaded(images).items())
        say(f"reloaded in one process: {'the same' if same else 'OTHER'} predictions")
    dist.barrier()
    dist.destroy_process_group()


def start(world: int, folder: str) -> None:
    """What torchrun does: this script in ``world`` processes, which find each other at a port that is free."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    same = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    same |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # DDP notes each batch that has all labels
    command = [sys.executable, __file__, folder]
    processes = [
        subprocess.Popen(command, env=os.environ | same | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    if any([process.wait() for process in processes]):
        sys.exit("a process failed")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    if "RANK" in os.environ:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "fsdp2-run"))
    else:
        with TemporaryDirectory() as folder:
            start(2, folder)
