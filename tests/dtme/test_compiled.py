"""torch.compile: no breaks, one graph for every batch, one for all tasks in turn; blocks compiled by themselves."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import dtme
from tests.dtme.clients import SDPA, TASKS, WIDTH, make_input

MANY = tuple(f"t{i}" for i in range(11))


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def many_tasks(partial):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    model = dtme.MultiTaskModel(vit, {task: nn.Linear(24, 2) for task in MANY}).double().eval()
    some = MANY[:4] if partial else MANY
    dtme.expand(model, dtme.ExpansionPlan(MANY, 2, {"blocks.0": some}, {"blocks.1": some[1:], "blocks.2": MANY}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(torch.randn_like(parameter))
    return model, torch.randn(2, 3, 16, 16).double()


@pytest.mark.parametrize("partial", [False, True], ids=["all tasks", "some tasks"])
def test_eleven_tasks_in_turn_take_two_graphs(compiler, caplog, partial):
    """One for the backbone, one for heads of one kind; also where only some tasks have modules."""
    model, x = many_tasks(partial)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for task in MANY:
            torch.testing.assert_close(compiled(x, task)[task], model(x, task)[task], rtol=1e-10, atol=1e-10)
    assert compiler.frame_count == 2 and "recompile" not in caplog.text


@pytest.mark.parametrize("client", ["timm ViT", "transformers BERT"])
def test_batches_of_any_size_share_a_graph(expanded, compiler, client):
    model, _ = expanded(client)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for rows in (2, 3, 5):
        x = make_input(client, rows, seed=rows)
        want, got = model(x), compiled(x)
        for task in TASKS:
            torch.testing.assert_close(got[task], want[task], rtol=1e-10, atol=1e-10)
    assert compiler.frame_count <= 2  # the second is for batches of any size


def test_a_model_that_was_never_called_before(expanded, compiler):
    """What it shares is found out outside of the graph."""
    model, x = expanded("timm ViT")
    model.train()
    out = torch.compile(model, backend=compiler, fullgraph=True)(x)
    assert compiler.frame_count == 1 and dtme.sharing_of(model) == "shared prefix"
    sum(p.square().sum() for p in out.values()).backward()
    other, _ = expanded("timm ViT")
    sum(p.square().sum() for p in other.train()(x).values()).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


def test_the_backbone_alone_under_a_choice(expanded, compiler):
    model, x = expanded("timm ViT")
    compiled = torch.compile(model.backbone, backend=compiler, fullgraph=True)
    for names in (TASKS, TASKS[1:], "depth", "normals"):
        with torch.no_grad(), dtme.tasks(model.backbone, names):
            torch.testing.assert_close(compiled(x), model.backbone(x), rtol=1e-10, atol=1e-10)
    assert compiler.frame_count == 3  # the single tasks share one


@pytest.mark.parametrize("replaced", [False, True], ids=["compile()", "torch.compile(block)"])
def test_blocks_compiled_by_themselves(expanded, compiler, replaced):
    model, x = expanded("timm ViT")
    other, _ = expanded("timm ViT")
    blocks = other.backbone.blocks
    for i, block in enumerate(blocks):
        if replaced:
            blocks[i] = torch.compile(block, backend=compiler)
        else:
            block.compile(backend=compiler)
    for names in (None,) if replaced else (None, "depth"):
        for task, want in model(x, names).items():
            torch.testing.assert_close(other(x, names)[task], want, rtol=1e-10, atol=1e-10)
    assert compiler.frame_count and all(expansion.traced is None for expansion in dtme.streams.expansions(other))
    grads = []
    for some in (model, other):
        some.zero_grad()
        sum(p.square().sum() for p in some(x).values()).backward()
        grads.append([p.grad for p in some.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Larger(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.stack([p.mean() for p in self.model(x).values()]).sin()


def test_inside_of_something_larger(expanded, compiler):
    """There the first call cannot be compared: tasks run one by one until one was, outside of the graph."""
    model, x = expanded("timm ViT")
    larger = Larger(model)
    compiled = torch.compile(larger, backend=compiler, fullgraph=True)
    first = compiled(x)
    torch.testing.assert_close(first, larger(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(compiled(x), first, rtol=1e-10, atol=1e-10)
    assert compiler.frame_count == 2


def test_a_graph_that_breaks_in_the_middle(expanded, compiler):
    model, x = expanded("own, generic seam")
    want = model(x)
    model.backbone.layers[1].mlp.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend=compiler)
    for names in (None, "depth"):
        for task, got in compiled(x, names).items():
            torch.testing.assert_close(got, want[task], rtol=1e-10, atol=1e-10)
    assert compiler.frame_count > 1


class SavesMemory(nn.Module):
    """A block that checkpoints itself, as transformers' do: the hooks on it stay outside."""

    saves = False

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.mlp = nn.LayerNorm(WIDTH), SDPA(), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(x)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.saves else self.run(x)


@pytest.mark.parametrize("names", [None, "depth"])
def test_compiled_blocks_that_checkpoint_themselves(compiler, names):
    torch.manual_seed(0)
    blocks = nn.Sequential(SavesMemory(), SavesMemory(), SavesMemory())
    model = dtme.MultiTaskModel(blocks, {task: nn.Linear(WIDTH, 2) for task in TASKS}).double().train()
    plan = dtme.ExpansionPlan(TASKS, 2, {"1": TASKS, "2": TASKS[:1]}, {"1": TASKS}, dict.fromkeys("012", WIDTH))
    dtme.expand(model, plan)
    x = torch.randn(4, 5, WIDTH).double()

    def gradients(run):
        model.zero_grad()
        sum((i + 1) * p.square().sum() for i, p in enumerate(run(x, names).values())).backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    want = gradients(model)
    for block in blocks:
        block.saves = True
    for run in (model, torch.compile(model, backend=compiler)):
        for a, b in zip(gradients(run), want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
