"""Conflicts counted image by image: their sums are those of an analysis, whatever view they are split into."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import dtme
import dtme_kernels
from benchmarks.paper.data import Options
from benchmarks.paper.experiments import ARMS
from benchmarks.paper.losses import cross_entropy, l1_loss
from benchmarks.paper.metrics import Accuracy, L1Error
from benchmarks.paper.runner.batches import items_to_read
from benchmarks.paper.runner.config import Config
from benchmarks.paper.runner.one import RunOfArm, Workplace
from benchmarks.paper.signal import measurement as m
from benchmarks.paper.signal.counts import Reading, count, measure, permuted
from benchmarks.paper.signal.heads import HeadLosses
from benchmarks.paper.signal.probe import Probe
from benchmarks.paper.tasks import Task, losses_of
from dtme.analysis.spaces import Space

RATIOS = (1.0, 10.0, 100.0, 1000.0)
BATCH, SAMPLE, IMAGES, PERMUTED = 4, 8, 24, 8
TASKS = {
    "kind": Task(3, cross_entropy, lambda: Accuracy(3), "accuracy", "%", lower_is_better=False, is_dense=False),
    "size": Task(1, l1_loss, lambda: L1Error(), "L1", "", lower_is_better=True, is_dense=False),
    "place": Task(2, l1_loss, lambda: L1Error(), "L1", "", lower_is_better=True, is_dense=False),
}


class First(torch.nn.Linear):
    def forward(self, tokens):
        return super().forward(tokens.mean(1))


def heads():
    return {name: First(16, task.channels).double() for name, task in TASKS.items()}


def labels(seed):
    draw = torch.Generator().manual_seed(seed)
    found = {
        "kind": torch.randint(3, (BATCH,), generator=draw),
        "size": torch.randn(BATCH, 1, generator=draw, dtype=torch.float64),
        "place": torch.randn(BATCH, 2, generator=draw, dtype=torch.float64),
    }
    found["size"][0] = float("nan")  # has no label
    return found


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).double()
    model = dtme.MultiTaskModel(backbone, heads(), features=lambda net, x: net(x).last_hidden_state)
    loader = [(torch.randn(BATCH, 3, 16, 16, dtype=torch.float64), labels(i)) for i in range(IMAGES // BATCH)]
    return model.eval(), loader


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = BertModel(BertConfig(**sizes, vocab_size=50), add_pooling_layer=False).double()
    model = dtme.MultiTaskModel(backbone, heads(), features=lambda net, x: net(**x).last_hidden_state)
    loader = []
    for i in range(IMAGES // BATCH):
        mask = (torch.arange(6) < torch.tensor([[6], [3], [4], [2]])).long()
        loader.append(({"input_ids": torch.randint(50, (BATCH, 6)), "attention_mask": mask}, labels(i)))
    return model.eval(), loader


@pytest.fixture(params=["images", "texts"])
def model_and_loader(request):
    return request.getfixturevalue(request.param)


def reading(loader):
    return Reading(loader, len(loader), BATCH, SAMPLE, PERMUTED, RATIOS)


@pytest.fixture
def found(model_and_loader):
    model, loader = model_and_loader
    return measure(model, TASKS, reading(loader), 3, 0.25, lambda images: None)


def analysed(model, loader, ratio, **options):
    report = dtme.analyze(model, loader, losses_of(TASKS), ratio=RATIOS, progress=False, **options).at(ratio)
    i, j = np.triu_indices(len(TASKS), 1)
    return report, [
        np.stack([x[:, i, j] for x in (report.range_counts, report.null_counts)], -1),
        report.valid_counts[:, i, j],
    ]


def test_the_sums_over_images_are_the_counts_of_an_analysis(model_and_loader, found):
    model, loader = model_and_loader
    counts = found.views[m.TOKENS]
    for at, ratio in enumerate(RATIOS):
        report, (conflicts, valid) = analysed(model, loader, ratio)
        assert found.blocks == report.blocks and found.ranks[at].tolist() == report.ranks.tolist()
        ours = (counts.negative.astype(int) + counts.zero).sum(0)[:, :, at]
        assert (ours == conflicts).all() and (counts.valid.astype(int).sum(0) == valid.numpy()).all()
        _, (letter, of_all) = analysed(model, loader, ratio, count_zero_gradients=True)
        absent = counts.absent.astype(int).sum(0)
        assert absent.any() and (ours + absent[..., None] == letter).all()
        assert (counts.valid.astype(int).sum(0) + absent == of_all.numpy()).all()


def test_a_sample_in_a_space_of_its_own_is_what_an_analysis_of_it_alone_counts(model_and_loader, found):
    model, loader = model_and_loader
    counts = found.views[m.OWN_SPACE]
    for number in range(IMAGES // SAMPLE):
        part = loader[number * SAMPLE // BATCH :][: SAMPLE // BATCH]
        report, (conflicts, _) = analysed(model, part, 100.0)
        assert found.sample_ranks[number, 2].tolist() == report.ranks.tolist()
        rows = slice(number * SAMPLE, (number + 1) * SAMPLE)
        ours = (counts.negative[rows].astype(int) + counts.zero[rows]).sum(0)[:, :, 2]
        assert (ours == conflicts).all()


def test_permuted_labels_are_counted_as_if_they_were_the_loader_s(model_and_loader, found):
    model, loader = model_and_loader
    counts = found.views[m.PERMUTED]
    assert len(counts.valid) == PERMUTED
    other = measure(
        model, TASKS, reading([permuted(batch, TASKS) for batch in loader]), 3, 0.25, lambda images: None
    ).views[m.TOKENS]
    assert (counts.negative == other.negative[:PERMUTED]).all() and (counts.valid == other.valid[:PERMUTED]).all()
    assert (counts.negative != found.views[m.TOKENS].negative[:PERMUTED]).any()


def test_no_two_tasks_keep_the_labels_of_one_image():
    numbers = torch.arange(BATCH)
    _, targets = permuted((None, dict.fromkeys(TASKS, numbers)), TASKS)
    assert all((target != numbers).all() for target in targets.values())
    assert all((targets[one] != targets[other]).all() for one, other in combinations(TASKS, 2))


def naive(gradients, basis, rank, i, j):
    h = gradients @ basis
    return (h[i, :rank] @ h[j, :rank]).item(), (h[i, rank:] @ h[j, rank:]).item()


@pytest.mark.parametrize("view, over", [(m.OVER_TOKENS, 1), (m.OVER_IMAGES, 0)])
def test_averages_are_taken_before_the_sign(images, view, over):
    model, loader = images
    found = measure(model, TASKS, reading(loader), 0, 0.0, lambda images: None).views[view]
    report = dtme.analyze(model, loader, losses_of(TASKS), ratio=10.0, progress=False)
    inputs = {}
    handles = [
        model.backbone.get_submodule(block).register_forward_pre_hook(
            lambda module, args, kwargs, block=block: inputs.__setitem__(block, (*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
        for block in report.blocks
    ]
    x, targets = loader[0]
    predictions = model(x)
    for handle in handles:
        handle.remove()
    tokens = [inputs[block] for block in report.blocks]
    gradients = [
        torch.autograd.grad(TASKS[t].loss(predictions[t], targets[t]), tokens, retain_graph=True) for t in TASKS
    ]
    checked = 0
    for d, (basis, rank) in enumerate(zip(report.bases, report.ranks.tolist(), strict=True)):
        mean = torch.stack([g[d].mean(over) for g in gradients])  # (K, N or B, p)
        for pair, (i, j) in enumerate(combinations(range(len(TASKS)), 2)):
            dots = np.array([naive(mean[:, u], basis.double(), rank, i, j) for u in range(mean.shape[1])])
            if over:  # a unit is an image
                assert (found.negative[:BATCH, d, pair, 1] == (dots < 0)).all()
            else:  # a unit is a batch, which has a product at every position
                assert (found.negative[0, d, pair, 1] == (dots < 0).sum(0)).all()
            checked += 1
    assert checked == 9


def test_counts_are_those_of_the_operation_at_any_scale():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    gradients = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    gradients[1] *= 1e-200  # the product of two such underflows
    gradients[:, 2, 3] = 0
    negative, zero, valid, absent = count(
        gradients, Space(basis, torch.ones(12), (1, 5)), torch.ones(5, 7, dtype=torch.bool)
    )
    for r, rank in enumerate((1, 5)):
        want = dtme_kernels.count_conflicts(gradients, basis, rank)
        for s, matrix in enumerate((want.range, want.null)):
            assert ((negative + zero)[..., r, s].sum(0) == matrix[torch.triu_indices(3, 3, 1).unbind()]).all()
    assert valid.sum() == 3 * 34 and absent.sum() == 3 and absent[2].tolist() == [1, 1, 1]


def test_a_file_brings_back_what_was_measured(found, tmp_path):
    found.save(tmp_path / "one.npz")
    again = m.Measurement.load(tmp_path / "one.npz")
    assert again.digest == found.digest and again.pairs == found.pairs and list(again.views) == list(m.VIEWS)
    assert replace(again, seed=4).digest != found.digest
    content = (tmp_path / "one.npz").read_bytes()
    (tmp_path / "one.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"one\.npz is no measurement"):
        m.Measurement.load(tmp_path / "one.npz")


# --- along a training -------------------------------------------------------------------------------------------------


def test_a_seed_is_measured_along_the_joint_training_of_the_evaluation(tmp_path):
    options = Options(tasks=("semseg", "depth", "normals"), size=(32, 32), train=24, val=4, cache=tmp_path / "cache")
    config = Config("joint", 1, options=options, steps=8, batch=4, read=16, conflicts=False)
    probe = Probe(config, tmp_path / "out", (0.0, 0.25, 0.5), sample=8, permuted=4)
    probe.run()
    found = [m.Measurement.load(probe.path(share)) for share in probe.shares]
    assert [one.share for one in found] == [0, 0.25, 0.5] and len({one.digest for one in found}) == 3
    # trained in one go it is the same to the last bit, though this one went on from the quarter
    alone = Probe(config, tmp_path / "alone", (0.5,), sample=8, permuted=4)
    alone.run()
    assert m.Measurement.load(alone.path(0.5)).digest == found[2].digest
    run = RunOfArm(replace(config, expand_at=0.5), ARMS["joint"], Workplace(tmp_path / "run"))
    report = dtme.analyze(run.joint_part().model, run.to_read(), losses_of(run.data.tasks), progress=False)
    assert report.num_samples == 16 == len(set(items_to_read(config, 24)))
    assert found[2].ranks[2].tolist() == report.ranks.tolist()
    torch.testing.assert_close(HeadLosses.load(probe.heads(0.5)).losses, report.head_losses, rtol=1e-5, atol=0)
