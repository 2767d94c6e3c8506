"""Backbones that do with rows what they like, and how all tasks at once are held against each alone."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import dtme
from tests.dtme.clients import SDPA, TASKS, WIDTH, OwnBlock, OwnTransformer, concatenated

DEPTH, HEADS, LENGTH = 3, 3, 5


class Masked(SDPA):
    """Attention with something added to its scores."""

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Guided(OwnBlock):
    """A block that takes more than its tokens."""

    def __init__(self):
        super().__init__(Masked())

    def forward(self, x, bias=None, scale=None, skip=None, shifts=(), last=None):
        x = x if skip is None else x + skip.roll(1, 1)
        x = x if scale is None else x * scale
        x = x if last is None else x * last.permute(2, 0, 1)
        for shift in shifts:
            x = x + shift
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class Guiding(nn.Module):
    """Gives every block what ``make`` makes of its input and of earlier tokens."""

    def __init__(self, make):
        super().__init__()
        self.blocks, self.make = nn.ModuleList(Guided() for _ in range(DEPTH)), make

    def forward(self, x):
        states = [x]
        for block in self.blocks:
            x = block(x, **self.make(states))
            states.append(x)
        return x


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = OwnTransformer(2), OwnTransformer(2)

    def forward(self, x):
        return self.left(x).mean(1) * self.right(x.flip(1)).amax(1)


class Twice(nn.Module):
    """One encoder for two views of an image."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        return self.encoder(x) - self.encoder(x.flip(0)).flip(0)


class Frames(nn.Module):
    """Every image is two rows of the blocks."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        rows = torch.stack([x, -x], 1).flatten(0, 1)
        return self.encoder(rows).view(len(x), 2, *x.shape[1:]).sum(1)


class Mixing(nn.Module):
    """Rows of one batch are not independent of each other."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        y = self.encoder(x)
        return y - y.mean(0)


class Maps(nn.Module):
    """Reshapes its tokens by the batch of its input."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        return self.encoder(x).reshape(len(x), -1, WIDTH).transpose(1, 2)


class TokensFirst(nn.Module):
    """Returns (N, B, p)."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        return self.encoder(x).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(OwnBlock(SDPA()), OwnBlock(SDPA()))

    def forward(self, x):
        for _ in range(3):
            x = self.layers(x)
        return x


class EarlyExit(nn.Module):
    """Leaves after a number of blocks that depends on its input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(OwnBlock(SDPA()) for _ in range(DEPTH))

    def forward(self, x):
        stop = 1 + int(x[0, 0, 0] > 0) * 2
        for block in self.layers[:stop]:
            x = block(x)
        return x


class Table(nn.Module):
    """Returns a table beside its tokens, which has nothing to do with the images."""

    def __init__(self):
        super().__init__()
        self.encoder, self.table = OwnTransformer(), nn.Parameter(torch.randn(9, 2))

    def forward(self, x):
        return self.encoder(x), self.table


def ramp(*shape):
    return torch.linspace(0, 1, torch.Size(shape).numel()).view(shape).double()


def per_image(states):
    return {"bias": torch.cdist(states[0], states[0])[:, None], "scale": states[0].mean((1, 2), keepdim=True)}


BACKBONES = {
    "plain": (OwnTransformer, True),
    "a bias per head": (lambda: Guiding(lambda s: {"bias": ramp(HEADS, 5, 5)}), True),
    "a bias per image": (lambda: Guiding(per_image), True),
    "a table of positions": (lambda: Guiding(lambda s: {"shifts": [ramp(5, WIDTH)]}), True),
    "a list of shifts per image": (lambda: Guiding(lambda s: {"shifts": [s[0][:, :1], s[0].new_ones(1, 1, 1)]}), True),
    "skips of earlier tokens": (lambda: Guiding(lambda s: {"skip": s[len(s) // 2]}), True),
    "images on the last axis": (lambda: Guiding(lambda s: {"last": s[0].mean((1, 2)).expand(1, 1, -1)}), False),
    "two towers": (Towers, False),
    "two views, one encoder": (Twice, False),
    "frames": (Frames, False),
    "rows that mix": (Mixing, False),
    "maps by the batch": (Maps, False),
    "tokens first": (TokensFirst, True),
    "a stack that recurs": (Recurrent, True),
    "early exit": (EarlyExit, None),
    "a table beside the tokens": (Table, True),
}  # fmt: skip


def expanded(make, partial_plan=True, **options):
    """A plain model, the same expanded, and what was added."""
    torch.manual_seed(0)
    plain = dtme.MultiTaskModel(make(), {task: nn.Identity() for task in TASKS}, features=lambda net, x: net(x))
    plain = plain.double().eval()
    model = copy.deepcopy(plain)
    blocks = [n for n, m in model.backbone.named_modules() if isinstance(m, OwnBlock)]
    some = TASKS[:1] if partial_plan else TASKS
    modulation = {blocks[0]: some, blocks[-1]: TASKS}
    plan = dtme.ExpansionPlan(TASKS, 2, modulation, {})
    dtme.expand(model, plan, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    added = {n.removeprefix("backbone."): p.detach() for n, p in model.named_parameters() if ".dtme." in n}
    return plain, model, added


def flat(tree):
    return torch.cat([part.flatten() for part in (tree if isinstance(tree, tuple) else (tree,))])


def worst(plain, model, added, x):
    """The largest difference between all tasks at once, each alone, and a plain model with hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_once = model(x)
    found = 0.0
    for task in TASKS:
        with concatenated(plain.backbone, added, task):
            want = plain(x, task)[task]
        for got in (at_once[task], model(x, task)[task]):
            assert [t.shape for t in (got if isinstance(got, tuple) else (got,))] == [
                t.shape for t in (want if isinstance(want, tuple) else (want,))
            ]
            found = max(found, (flat(got) - flat(want)).abs().max().item())
    return found


def equals_each_alone(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.get_rng_state()
        at_once = model(x)
        for task in TASKS:
            torch.set_rng_state(state)
            torch.testing.assert_close(at_once[task], model(x, task)[task], rtol=1e-9, atol=1e-9)


def timm_vit(depth=4, **options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=depth, num_heads=3, num_classes=0, **options
    )


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)
