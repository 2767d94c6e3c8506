"""``pretrain``: a backbone of one's own by masked reconstruction (SimMIM), on images that no experiment looks at.

Xie et al., CVPR 2022: patches are replaced by a learnt token, and a linear layer on the backbone's tokens tells their
pixels; the loss is L1 over the hidden ones. What comes out is a folder that ``--backbone`` takes.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dtme.comparison.training import POWER

from ..clients import import_torchvision
from .data import DATA_SETS, Options, open_data
from .models import OWN_IMAGE, SMALL_PATCH, image_config
from .runner.batches import training_batches
from .runner.config import Config

HIDDEN = 0.6
"""Share of the patches."""
DATA_SEED = 1000
"""Of the images, which experiments draw with 0 unless told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the backbone; must not be there yet")
    parser.add_argument("--data", choices=DATA_SETS, default="rooms")
    parser.add_argument("--root", type=Path, help="where the data set's files are")
    parser.add_argument("--size", type=int, default=48, help="pixels along a side")
    parser.add_argument("--backbone", choices=OWN_IMAGE, default="narrow")
    parser.add_argument("--train", type=int, help="at most so many images")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the masks")
    parser.add_argument("--data-seed", type=int, default=DATA_SEED, help="of images that are drawn")
    parser.add_argument("--cache", type=Path, default=Options().cache, help="for what can be made again")


def run(args: argparse.Namespace) -> None:
    try:
        pretrain(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def pretrain(args: argparse.Namespace) -> None:
    """Train, tell the loss, and save.

    Raises:
        ValueError: an option is out of its range, ``args.out`` is there, or the loss is not finite.
    """
    if args.out.exists():
        raise ValueError(f"--out {args.out} is there already: name another folder")
    for name in ("steps", "batch", "size", "lr"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} must be positive, got {getattr(args, name)}")
    if args.size % SMALL_PATCH:
        raise ValueError(f"--size must be a multiple of the patches' {SMALL_PATCH} pixels, got {args.size}")
    side = (args.size, args.size)
    options = Options(root=args.root, size=side, train=args.train, val=1, seed=args.data_seed, cache=args.cache)
    data = open_data(args.data, options)
    import_torchvision()
    from transformers import ViTForMaskedImageModeling

    torch.manual_seed(args.seed)
    config = image_config(args.backbone, side)
    config.image_size, config.encoder_stride = args.size, SMALL_PATCH  # a number: it computes with it
    model = ViTForMaskedImageModeling(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    masks = torch.Generator().manual_seed(args.seed)
    plan = Config("", args.seed, data=args.data, options=options, batch=args.batch)
    patches = (args.size // SMALL_PATCH) ** 2
    count = max(1, round(HIDDEN * patches))
    losses = []
    batches = training_batches(data.train, plan, 0, args.steps)
    for step, (images, _) in enumerate(tqdm(batches, "pretraining", args.steps, unit="step")):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps) ** POWER
        hidden = torch.rand(len(images), patches, generator=masks).argsort(1) < count
        optimizer.zero_grad()
        loss = model(images, bool_masked_pos=hidden).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} at step {step}: take a lower --lr than {args.lr:g}")
    model.vit.embeddings.mask_token = None  # which only the pretraining knows
    model.vit.save_pretrained(args.out)
    first, last = (
        torch.stack(part).mean() for part in (losses[: 1 + args.steps // 20], losses[-1 - args.steps // 20 :])
    )
    print(f"{args.out}: L1 of hidden patches, normalised pixels, {first:.3f} at first, {last:.3f} at last")
