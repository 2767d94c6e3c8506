"""The analysis against a naive one with explicit projectors."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
import dtme_kernels
from dtme.blocks import find_blocks
from tests.dtme.clients import SDPA, TASKS, OwnBlock

LOSSES = {task: F.mse_loss for task in TASKS}


def first_image_only(prediction, target):
    """As if the other images' labels were all ignored: their gradients are exactly zero."""
    return F.mse_loss(prediction[:1], target[:1])


def tokens_that_count(x, tokens):
    """(B, N) bool: all but those that pad a sentence."""
    return (x["attention_mask"] if isinstance(x, dict) else torch.ones(tokens.shape[:2])).bool().numpy()


def naive_analysis(model, loader, losses, ratio):
    """Eq. 1-4 as printed, one task, one block and one token at a time; NumPy in float64."""
    blocks = find_blocks(model.backbone)
    seen = {}
    hooks = [b.register_forward_pre_hook(lambda m, a, n=n: seen.update({n: a[0]})) for n, b in blocks.items()]
    moments, samples = dict.fromkeys(blocks, 0), 0
    for x, _ in loader:
        model(x)
        samples += len(next(iter(seen.values())))
        for name in blocks:
            for image, counts in zip(seen[name].detach().numpy(), tokens_that_count(x, seen[name]), strict=True):
                moments[name] = moments[name] + image[counts].T @ image[counts]
    spaces = {}
    for name in blocks:
        values, vectors = np.linalg.eigh(moments[name] / samples)
        values, vectors = values[::-1].clip(0), vectors[:, ::-1]
        rank = sum(values[:k].sum() < ratio * values[k:].sum() for k in range(1, len(values)))
        rank = min(max(rank, 1), len(values) - 1)
        u_range, u_null = vectors[:, :rank], vectors[:, rank:]
        spaces[name] = (rank, u_range @ u_range.T, u_null @ u_null.T, values)
    k = len(losses)
    counts = {name: np.zeros((3, k, k), dtype=np.int64) for name in blocks}
    for x, targets in loader:
        grads = {name: [] for name in blocks}
        for task, loss in losses.items():
            out = model(x)
            grad = torch.autograd.grad(loss(out[task], targets[task]), [seen[n] for n in blocks], allow_unused=True)
            for name, g in zip(blocks, grad, strict=True):
                grads[name].append(g.detach().numpy()[tokens_that_count(x, g)])
        for name in blocks:
            _, p_range, p_null, _ = spaces[name]
            for i, j in itertools.combinations(range(k), 2):
                for a, b in zip(grads[name][i], grads[name][j], strict=True):
                    if a.any() and b.any():
                        hits = np.array([(p_range @ a) @ (p_range @ b) <= 0, (p_null @ a) @ (p_null @ b) <= 0, True])
                        counts[name][:, i, j] += hits
                        counts[name][:, j, i] += hits
    for hook in hooks:
        hook.remove()
    return {name: (spaces[name][0], spaces[name][3], counts[name]) for name in blocks}


@pytest.mark.parametrize("ratio", [3.0, 100.0])
@pytest.mark.parametrize(
    "client", ["own, generic seam", "transformers ViT", "timm ViT", "transformers BERT", "transformers DINOv2"]
)
def test_ranks_counts_and_rates_equal_the_naive_analysis(problem, client, ratio):
    model, loader = problem(client)
    losses = {**LOSSES, "depth": first_image_only}
    for parameter in model.backbone.parameters():  # the naive way needs a graph from the embeddings on
        parameter.requires_grad_(True)
    if "own" in client:
        loader = [(x.requires_grad_(), y) for x, y in loader]
    want = naive_analysis(model, loader, losses, ratio)
    report = dtme.analyze(model, loader, losses, ratio=ratio, progress=False)
    assert report.blocks == tuple(want) and report.tasks == TASKS and report.num_samples == 6
    for d, (rank, values, counts) in enumerate(want.values()):
        assert report.ranks[d] == rank
        np.testing.assert_allclose(report.eigenvalues[d].numpy(), values, rtol=1e-9, atol=1e-12 * values[0])
        for got, expected in zip((report.range_counts, report.null_counts, report.valid_counts), counts, strict=True):
            assert np.array_equal(got[d].numpy(), expected)
        upper = np.triu_indices(len(TASKS), 1)
        for got, row in ((report.range_rates, 0), (report.null_rates, 1)):
            assert got[d].item() == counts[row][upper].sum() / counts[2][upper].sum()
    if "BERT" not in client:  # three batches, of each of which depth saw one image
        assert (report.valid_counts[:, 0, 2] == 2 * report.valid_counts[:, 0, 1]).all()
    assert report.valid_counts.sum() > 0


def test_counting_zero_gradients_is_algorithm_1s_letter(problem):
    model, loader = problem()
    losses = {**LOSSES, "depth": first_image_only}
    own = dtme.analyze(model, loader, losses, progress=False)
    letter = dtme.analyze(model, loader, losses, progress=False, count_zero_gradients=True)
    assert (letter.valid_counts[:, ~torch.eye(3, dtype=torch.bool)] == 30).all()
    ignored = torch.tensor([[0, 15, 0], [15, 0, 15], [0, 15, 0]])  # three images of five tokens
    for name in ("range_counts", "null_counts"):
        assert torch.equal(getattr(letter, name) - getattr(own, name), ignored.expand(3, 3, 3))


def test_a_step_function_gives_the_same_report(problem):
    model, loader = problem()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    def step(whole, batch):
        x, targets = batch
        return {task: LOSSES[task](prediction, targets[task]) for task, prediction in whole(x).items()}

    want = dtme.analyze(model, loader, LOSSES, progress=False)
    got = dtme.analyze(Whole(), loader, step, blocks="inner.backbone.layers", progress=False)
    assert got.blocks == tuple(f"inner.backbone.{name}" for name in want.blocks)
    direct = dtme.analyze(model, loader, step, progress=False)
    for name in ("ranks", "range_counts", "null_counts", "valid_counts"):
        assert torch.equal(getattr(got, name), getattr(want, name))
        assert torch.equal(getattr(direct, name), getattr(want, name))


def test_blocks_by_path_name_or_module_and_batch_limits(problem):
    model, loader = problem()
    layers = model.backbone.layers
    for blocks, names in (
        ("layers", ("layers.0", "layers.1", "layers.2")),
        (["layers.1"], ("layers.1",)),
        ([layers[2]], ("layers.2",)),
    ):
        assert dtme.analyze(model, loader, LOSSES, blocks=blocks, progress=False).blocks == names
    assert dtme.analyze(model, loader, LOSSES, max_batches=2, progress=False).num_samples == 5
    report = dtme.analyze(model, loader, LOSSES, covariance_batches=1, progress=False)
    assert report.num_samples == 3 and report.valid_counts[0, 0, 1] == 30
    assert torch.equal(report.valid_counts, dtme.analyze(model, loader, LOSSES, progress=False).valid_counts)


def test_blocks_of_different_widths(build):
    torch.manual_seed(0)
    backbone = nn.Sequential(OwnBlock(SDPA()), nn.Linear(24, 12), OwnBlock(SDPA(12), 12))
    model = dtme.MultiTaskModel(backbone, {"a": nn.Linear(12, 2), "b": nn.Linear(12, 2)}).double()
    loader = [
        (torch.randn(4, 5, 24).double(), {"a": torch.randn(4, 5, 2).double(), "b": torch.randn(4, 5, 2).double()})
    ]
    report = dtme.analyze(model, loader, {"a": F.mse_loss, "b": F.l1_loss}, progress=False)
    assert [len(values) for values in report.eigenvalues] == [24, 12] and report.num_features == {"0": 24, "2": 12}
    plan = report.plan(modulation=1.0, expansion=1.0, num_tokens=2)
    assert plan.added_parameters() == plan.added_parameters([24, 12]) == 2 * (2 + 2) * (24 + 12)
    x = loader[0][0]
    before = model(x)["a"]
    dtme.expand(model, report.plan(expansion=0, modulation=1.0))
    torch.testing.assert_close(model(x)["a"], before)
    assert "0" in str(report)


def test_an_expanded_model_is_analysed_in_its_own_streams(problem):
    """At its start an affine plan changes nothing, so neither does it change what the tasks' gradients are."""
    model, loader = problem()
    want = dtme.analyze(model, loader, LOSSES, progress=False)
    dtme.expand(model, want.plan(expansion=0, modulation=1.0))
    got = dtme.analyze(model, loader, LOSSES, progress=False)
    for name in ("ranks", "range_counts", "null_counts", "valid_counts"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("shared_prefix", ["auto", False], ids=["shared", "one by one"])
def test_an_expanded_model_is_analysed_as_its_tasks_are_alone(problem, randomise, shared_prefix):
    """Streams part at the second block, some of them at the third: each task's tokens and gradients are those it has
    alone, and the token space is of the mean of all tasks' second moments."""
    model, loader = problem()
    _, second, third = find_blocks(model.backbone)
    plan = dtme.ExpansionPlan(TASKS, 2, {second: TASKS[:1]}, {third: TASKS[1:]})
    dtme.expand(model, plan, shared_prefix=shared_prefix)
    randomise(model)
    report = dtme.analyze(model, loader, LOSSES, ratio=3.0, progress=False)
    seen, moments, grads = {}, dict.fromkeys(report.blocks, 0), []
    handles = [
        model.backbone.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.update({name: a[0]}), prepend=True
        )
        for name in report.blocks
    ]
    for x, targets in loader:
        own = {name: [] for name in report.blocks}
        for task in TASKS:
            loss = LOSSES[task](model(x.clone().requires_grad_(), task)[task], targets[task])
            for name, gradient in zip(
                report.blocks, torch.autograd.grad(loss, [seen[n] for n in report.blocks]), strict=True
            ):
                tokens = seen[name].detach().flatten(0, 1)
                moments[name] = moments[name] + tokens.mT @ tokens / len(TASKS)
                own[name].append(gradient)
        grads.append(own)
    for handle in handles:
        handle.remove()
    for d, name in enumerate(report.blocks):
        space = dtme_kernels.split_token_space(moments[name] / report.num_samples, 3.0)
        assert space.rank == report.ranks[d]
        torch.testing.assert_close(space.eigenvalues, report.eigenvalues[d], rtol=1e-6, atol=1e-9)
        counts = [dtme_kernels.count_conflicts(torch.stack(own[name]), space.basis, space.rank) for own in grads]
        for kind in ("range", "null", "valid"):
            assert torch.equal(sum(getattr(c, kind) for c in counts), getattr(report, f"{kind}_counts")[d]), (
                name,
                kind,
            )


def test_it_runs_under_no_grad_and_inference_mode_of_the_caller(problem):
    model, loader = problem()
    want = dtme.analyze(model, loader, LOSSES, progress=False)
    with torch.no_grad():
        got = dtme.analyze(model, loader, LOSSES, progress=False)
    assert torch.equal(want.null_counts, got.null_counts)


def test_two_progress_bars(problem, capsys):
    model, loader = problem()
    dtme.analyze(model, loader, LOSSES)
    bars = capsys.readouterr().err
    assert "token space" in bars and "conflicts" in bars and "3/3" in bars
