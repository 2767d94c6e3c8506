"""Task tokens in a release of timm against concatenation: run by ``test_timm_releases``, that release on the path."""

import sys

import torch

from benchmarks.clients import import_torchvision

import_torchvision()

import timm  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

import dtme  # noqa: E402
from dtme.blocks import find_blocks  # noqa: E402
from tests.dtme.clients import concatenated  # noqa: E402

TASKS = ("a", "b", "c")


def check_vit() -> None:
    """All tasks at once, outputs and gradients of everything that trains."""
    net = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0, qkv_bias=True)
    net, x = net.double().eval(), torch.randn(3, 3, 32, 32).double()
    plan = {"blocks.0": ("a",), "blocks.1": TASKS}, {"blocks.1": TASKS, "blocks.2": ("b", "c")}
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, *plan))
    added = moved(net)
    parameters = list(net.parameters())
    with dtme.tasks(net, TASKS):
        got = dtme.split(net.forward_features(x), TASKS)
    ours = torch.autograd.grad(loss(got), parameters, allow_unused=True)
    assert dtme.sharing_of(net) == "shared prefix"
    dtme.collapse(net)
    want = {}
    for task in TASKS:
        with concatenated(net, added, task):
            want[task] = net.forward_features(x)
    naive = torch.autograd.grad(loss(want), parameters, allow_unused=True)
    for task in TASKS:
        torch.testing.assert_close(got[task], want[task], rtol=0, atol=1e-10)
    for mine, theirs in zip(ours, naive, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def check_swin() -> None:
    """Windows cannot be given more tokens: concatenated to their keys and values as the qkv layer gives them."""
    net = SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2,), num_heads=(3,), num_classes=0
    )
    net, x = net.double().eval(), torch.randn(2, 3, 32, 32).double()
    blocks = list(find_blocks(net))
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, dict.fromkeys(blocks, TASKS)))
    added = moved(net)
    with dtme.tasks(net, TASKS):
        got = dtme.split(net.forward_features(x), TASKS)
    dtme.collapse(net)
    for task in TASKS:
        for name in blocks:
            block = net.get_submodule(name)
            block.attn.forward = lambda x, mask=None, block=block, name=name, task=task: windowed(
                block, added[f"{name}.dtme.tokens.{task}"], x, mask
            )
        torch.testing.assert_close(got[task], net.forward_features(x), rtol=0, atol=1e-10)


def windowed(block, tokens, x, mask):
    """Swin's window attention, written anew."""
    attention, rows, n = block.attn, *x.shape[:2]
    y = torch.cat([x, block.norm1(tokens).expand(rows, -1, -1)], 1)
    q, k, v = attention.qkv(y).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    bias = attention.relative_position_bias_table[attention.relative_position_index.view(-1)].view(n, n, 3)
    bias = bias.permute(2, 0, 1).unsqueeze(0)
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(rows // len(mask), 1, 1, 1)
    bias = torch.nn.functional.pad(bias, (0, len(tokens))).expand(rows, -1, -1, -1)
    out = torch.nn.functional.scaled_dot_product_attention(q[:, :, :n], k, v, bias)
    return attention.proj(out.transpose(1, 2).flatten(2))


def moved(net):
    added = {name: p for name, p in net.named_parameters() if ".dtme." in name}
    for parameter in added.values():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return added


def loss(outputs):
    return sum((i + 1) * y.square().sum() for i, y in enumerate(outputs.values()))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    assert timm.__version__ == sys.argv[1], f"timm {timm.__version__} is on the path, not {sys.argv[1]}"
    check_vit()
    check_swin()
    print("right")
