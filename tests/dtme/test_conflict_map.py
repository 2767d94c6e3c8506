"""Maps of conflicts in one batch: against cosines from gradients of the plain definition, and pictures of them."""

import dataclasses
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import dtme
from dtme.blocks import find_blocks
from tests.dtme.clients import TASKS
from tests.dtme.snapshots import Dropping, same, snapshot

LOSSES = {task: mse_loss for task in TASKS}
PAIRS = list(combinations(TASKS, 2))


def definition(model, batch, report, block, space):
    """A forward for each task, and the gradient at what enters the block."""
    x, target = batch
    gradients = []
    for task in report.tasks:
        entered = []
        module = model.backbone.get_submodule(block)
        handle = module.register_forward_pre_hook(
            lambda _, args, entered=entered: entered.append(args[0].requires_grad_()), prepend=True
        )
        loss = LOSSES[task](model(x, task)[task], target[task])
        handle.remove()
        gradients.append(torch.autograd.grad(loss, entered[0])[0])
    d = report.blocks.index(block)
    rotated = torch.stack(gradients) @ report.bases[d]
    rank = int(report.ranks[d])
    parts = rotated[..., :rank] if space == "range" else rotated[..., rank:]
    return {
        (report.tasks[i], report.tasks[j]): torch.cosine_similarity(parts[i], parts[j], dim=-1)
        for i, j in combinations(range(len(report.tasks)), 2)
    }


@pytest.mark.parametrize("space", ["range", "null"])
@pytest.mark.parametrize("expand", [False, True], ids=["plain", "expanded"])
@pytest.mark.parametrize("client", ["own, generic seam", "timm ViT"])
def test_equals_the_definition_and_leaves_the_model(problem, randomise, client, expand, space):
    model, loader = problem(client)
    blocks = list(find_blocks(model.backbone))
    report = dtme.analyze(model, loader, LOSSES, progress=False)
    if expand:
        dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {blocks[0]: TASKS, blocks[1]: ("depth",)}, {blocks[2]: TASKS}))
        randomise(model)
    model.train()
    before = snapshot(model)
    maps = dtme.conflict_map(model, loader[0], LOSSES, report, blocks[1], space)
    same(before, snapshot(model))
    want = definition(model.eval(), loader[0], report, blocks[1], space)
    assert list(maps) == PAIRS
    for pair, cosine in maps.items():
        torch.testing.assert_close(cosine, want[pair], rtol=1e-9, atol=1e-9)
        assert cosine.abs().max() <= 1 and cosine.device.type == "cpu"


def test_signs_are_the_conflicts_that_analyze_counts(problem):
    model, loader = problem()
    model.heads["semseg"] = Dropping().double()
    model.eval()
    report = dtme.analyze(model, loader, LOSSES, progress=False)
    for space, counts in (("range", report.range_counts), ("null", report.null_counts)):
        for d, block in enumerate(report.blocks):
            maps = [dtme.conflict_map(model, batch, LOSSES, report, block, space) for batch in loader]
            for (i, one), (j, other) in combinations(enumerate(TASKS), 2):
                assert sum(int((some[one, other] <= 0).sum()) for some in maps) == counts[d, i, j]


def test_nan_where_a_gradient_is_zero_or_a_token_does_not_count(problem):
    model, loader = problem()
    model.backbone.layers[2] = nn.Identity()  # so that tokens do not mix behind the second block
    x, target = loader[0]
    target["depth"][0, 1:3] = model(x, "depth")["depth"][0, 1:3].detach()  # no gradient there
    model.backbone.layers[1] = nn.Sequential(nn.Identity())
    blocks = ["layers.0", "layers.1"]
    report = dtme.analyze(model, loader[:2], LOSSES, blocks=blocks, progress=False)
    target["depth"] = target["depth"].clone()
    target["depth"][0, 1:3] = model(x, "depth")["depth"][0, 1:3].detach()
    maps = dtme.conflict_map(model, (x, target), LOSSES, report, "layers.1")
    for pair, cosine in maps.items():
        want = torch.zeros(cosine.shape, dtype=torch.bool)
        want[0, 1:3] = "depth" in pair
        assert torch.equal(cosine.isnan(), want)
    counts = torch.tensor([[True, True, False, True, False]] * 3)
    masked = dtme.conflict_map(model, (x, target), LOSSES, report, "layers.1", token_mask=lambda batch: counts)
    for pair, cosine in masked.items():
        assert torch.equal(cosine.isnan(), maps[pair].isnan() | ~counts)
        assert torch.equal(cosine[counts & ~maps[pair].isnan()], maps[pair][counts & ~maps[pair].isnan()])


def test_padding_of_a_mapping_does_not_count(problem):
    model, loader = problem("transformers BERT")
    report = dtme.analyze(model, loader, LOSSES, progress=False)
    mask = loader[0][0]["attention_mask"].bool()
    for cosine in dtme.conflict_map(model, loader[0], LOSSES, report, report.blocks[1], "null").values():
        assert torch.equal(cosine.isnan(), ~mask) and mask.sum() == 16


def test_what_does_not_fit_is_refused(problem, tmp_path):
    model, loader = problem()
    report = dtme.analyze(model, loader, LOSSES, progress=False)
    call = {"model": model, "batch": loader[0], "losses": LOSSES, "report": report, "block": "layers.1"}
    narrow = dataclasses.replace(report, bases=tuple(basis[:5, :5] for basis in report.bases))
    report.save(tmp_path / "report.json")
    loaded = dtme.ConflictReport.load(tmp_path / "report.json")
    short = torch.ones(3, 4, dtype=torch.bool)
    before = snapshot(model)
    for arguments, message in (
        ({"space": "both"}, "space must be"),
        ({"block": "layers.9"}, "'layers.9'"),
        ({"report": loaded}, r"analyze again, or save\(path, bases=True\)"),
        ({"report": narrow}, "5 channels, where the tokens have 24"),
        ({"losses": {task: mse_loss for task in TASKS[:2]}}, "report's tasks"),
        ({"token_mask": lambda batch: short}, "token_mask has 3 rows and 4 columns"),
        ({"token_mask": lambda batch: None}, "got NoneType"),
        ({"token_mask": lambda batch: torch.zeros(3, 5, dtype=torch.bool)}, "token_mask hides every token"),
        ({"model": None, "losses": print}, "the model must be a torch.nn.Module, got NoneType"),
        ({"report": None}, "report must be a ConflictReport, got NoneType"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            dtme.conflict_map(**(call | arguments))
    same(before, snapshot(model))
    report.save(tmp_path / "report.json", bases=True)
    again = dtme.conflict_map(**(call | {"report": dtme.ConflictReport.load(tmp_path / "report.json")}))
    for pair, cosine in dtme.conflict_map(**call).items():
        torch.testing.assert_close(again[pair], cosine, atol=1e-4, rtol=0)


# --- pictures ---------------------------------------------------------------------------------------------------------


def some_maps(num_tokens, num_pairs=3):
    generator = torch.Generator().manual_seed(0)
    maps = {pair: torch.rand(2, num_tokens, generator=generator) * 2 - 1 for pair in PAIRS[:num_pairs]}
    for values in maps.values():
        values[1, -2:] = torch.nan
    return maps


def drawn(path):
    from matplotlib.image import imread

    return imread(path)


def test_pictures_follow_maps_images_and_words(tmp_path):
    images = torch.rand(2, 3, 24, 32)
    files = []

    def draw(maps, **options):
        files.append(tmp_path / f"{len(files)}.png")
        dtme.plot_conflict_map(maps, files[-1], **options)
        return drawn(files[-1])

    maps = some_maps(5 + 12, num_pairs=1)
    pictures = [
        draw(maps, images=images),  # five leading tokens, 3 × 4 patches
        draw(maps, images=images, worst=0),
        draw(maps, images=images, grid=(4, 4), row=1),
    ]
    assert all(picture.shape == pictures[0].shape for picture in pictures)
    assert all((a != b).any() for a, b in combinations(pictures, 2))
    leading = {pair: torch.cat([-values[:, :5], values[:, 5:]], 1) for pair, values in maps.items()}
    assert (draw(leading, images=images) == pictures[0]).all()

    words = [f"word{i}$" for i in range(17)]
    sentence = draw(maps, tokens=words)
    assert (draw(maps, tokens=[words, words], row=0) == sentence).all()
    padded = [*words[:15], "[PAD]", "[PAD]"]  # whose values are NaN
    assert (draw(maps, tokens=padded, row=1) == draw(maps, tokens=words[:15], row=1)).all()
    tall = draw(some_maps(60), tokens=[f"word{i}" for i in range(58)], row=1)
    assert tall.shape[1] == sentence.shape[1] and tall.shape[0] > 2 * sentence.shape[0]


def test_pictures_of_what_does_not_fit_are_refused(tmp_path):
    maps, words = some_maps(17), ["word"] * 17
    images = torch.rand(2, 3, 24, 32)
    for given, message in (
        ((maps, {}), "either images or tokens"),
        ((maps, {"images": images, "tokens": words}), "either images or tokens"),
        (({}, {"tokens": words}), "at least one pair"),
        ((maps, {"tokens": words, "row": 2}), r"row must be in \[0, 2\)"),
        ((maps, {"tokens": words * 2}), "34 words for row 0, the maps have 17"),
        ((maps, {"tokens": words[:9]}), "9 words for row 0, where the maps have values for more"),
        ((maps, {"tokens": "word"}), "words of a sentence"),
        ((maps, {"tokens": words, "worst": -1}), "worst"),
        ((maps, {"images": images, "grid": (5, 5)}), "at most the maps' 17"),
        ((maps, {"images": images[0]}), "images must be"),
        ((some_maps(3), {"images": torch.rand(2, 3, 8, 80)}), "give grid="),
        ((maps | {("a", "b"): torch.zeros(2, 3)}, {"tokens": words}), "same batch"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            dtme.plot_conflict_map(given[0], tmp_path / "map.png", **given[1])
    assert not list(tmp_path.iterdir())
