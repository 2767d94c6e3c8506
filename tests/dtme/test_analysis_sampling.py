"""What an analysis reads and what of it counts: padding, missing labels, an early end, many tasks, other layouts."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
import dtme_kernels
from tests.dtme.analysed import analyze, make_batch, make_model, same
from tests.dtme.clients import SDPA, TASKS, WIDTH, OwnTransformer

# --- tokens that count ------------------------------------------------------------------------------------------------


def masked_loss(prediction, target):
    return F.mse_loss(prediction[:, :3], target[:, :3])


def test_tokens_that_a_mask_hides_count_for_nothing(problem):
    """Not even NaN: the report is that of the batches without them."""
    model = make_model()
    model.backbone.layers = nn.Sequential(model.backbone.layers[0])  # one block: no token reads another
    batches = [make_batch(seed=i) for i in range(9)]
    losses = dict.fromkeys(TASKS, masked_loss)
    want = analyze(model, [(x[:, :3], y) for x, y in batches], losses)
    for x, _ in batches:
        x[:, 3:] = 7.0
    hide = torch.tensor([True, True, True, False, False])
    everything = analyze(model, batches, losses)
    assert not torch.equal(everything.eigenvalues, want.eigenvalues)

    class Alone(SDPA):
        def forward(self, x):
            return torch.cat([super().forward(x[:, :3]), x[:, 3:] * 0], 1)

    attention = Alone().double()
    attention.load_state_dict(model.backbone.layers[0].attn.state_dict())
    model.backbone.layers[0].attn = attention
    got = analyze(model, batches, losses, token_mask=lambda batch: hide.expand(len(batch[0]), 5))
    assert torch.equal(got.ranks, want.ranks) and torch.equal(got.valid_counts, want.valid_counts)
    assert torch.equal(got.range_counts, want.range_counts) and torch.equal(got.null_counts, want.null_counts)
    torch.testing.assert_close(got.eigenvalues, want.eigenvalues)
    assert got.num_samples == want.num_samples == 18


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (lambda batch: torch.zeros(2, 5, dtype=torch.bool), ValueError, "token_mask hides every token"),
        (lambda batch: torch.ones(2, 4, dtype=torch.bool), ValueError, r"2 rows and 4 columns, but block 'layers.0'"),
        (lambda batch: torch.ones(2, 5), TypeError, r"bool tensor.*got \(2, 5\) torch.float32"),
        (lambda batch: None, TypeError, "got NoneType"),
        (3, TypeError, "token_mask must be None or a function"),
    ],
)
def test_masks_that_cannot_be_used(mask, error, says):
    with pytest.raises(error, match=says):
        analyze(make_model(), [make_batch()], token_mask=mask)


def test_nan_in_tokens_that_do_not_count_is_in_no_gain_either():
    model, batches = make_model(), [make_batch(seed=i) for i in range(8)]
    hide = torch.tensor([True, True, True, True, False])
    mask = {"token_mask": lambda batch: hide.expand(len(batch[0]), 5)}

    class Skipping(nn.Module):
        """Attends to the first four tokens, and hands the last on as it is."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.cat([self.inner(x[:, :4]), x[:, 4:]], 1)

    for block in model.backbone.layers:
        block.attn = Skipping(block.attn)
    losses = dict.fromkeys(TASKS, lambda p, y: F.mse_loss(p[:, :4], y[:, :4]))
    want = analyze(model, batches, losses, **mask)
    for x, _ in batches:
        x[:, 4] = float("nan")
    same(analyze(model, batches, losses, **mask), want)


def test_a_decoder_has_a_mask_of_its_own():
    """The encoder's would fit by its length alone."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = OwnTransformer(1), OwnTransformer(1)

        def forward(self, inputs, attention_mask=None, decoder_attention_mask=None):
            return self.decoder(self.encoder(inputs))

    torch.manual_seed(0)
    model = dtme.MultiTaskModel(Pair(), {task: nn.Linear(WIDTH, 2) for task in TASKS}).double()
    x, y = make_batch(rows=2)
    hidden, shorter = (torch.tensor([[1] * n + [0] * (5 - n)] * 2) for n in (3, 2))
    valid = []
    for masks in ({}, {"attention_mask": hidden}, {"attention_mask": hidden, "decoder_attention_mask": shorter}):
        report = analyze(model, [({"inputs": x, **masks}, y)] * 8)
        assert report.blocks == ("encoder.layers.0", "decoder.layers.0")
        valid.append((report.valid_counts[:, 0, 1] // 16).tolist())
    assert valid == [[5, 5], [3, 5], [3, 2]]


# --- labels that are there --------------------------------------------------------------------------------------------


def ignoring(prediction, target):
    """0 / 0 where all labels are ignored."""
    keep = target != 255
    return ((prediction - target)[keep] ** 2).sum() / keep.sum()


def test_a_task_without_labels_is_left_out_of_its_batches_and_counted():
    batches = [make_batch(seed=i) for i in range(8)]
    for i in (1, 4):
        del batches[i][1]["depth"]
    for i in (2, 4, 5):
        batches[i][1]["semseg"].fill_(255)
    report = analyze(make_model(), batches, dict.fromkeys(TASKS, ignoring))
    assert report.skipped == {"semseg": 3, "normals": 0, "depth": 2}
    i, j = (TASKS.index(task) for task in ("semseg", "depth"))
    counts = report.valid_counts[0] // 10  # two images of five tokens
    assert counts[i, j] == 4 and counts[i, TASKS.index("normals")] == 5 and counts[j, TASKS.index("normals")] == 6
    assert "depth" in next(line for line in str(report).splitlines() if "skipped" in line and "depth" in line)

    def step(model, batch):
        out = model(batch[0])
        return {t: ignoring(out[t], batch[1][t]) if t in batch[1] else 0.0 for t in TASKS}

    stepped = dtme.analyze(make_model(), batches, step, progress=False)
    same(stepped, report)
    assert stepped.skipped == report.skipped


def test_a_loss_that_the_prediction_breaks_is_no_missing_label():
    model, batches = make_model(), [make_batch(seed=i) for i in range(3)]
    broken = {**dict.fromkeys(TASKS, F.mse_loss), "depth": lambda p, y: F.mse_loss((p - p.max()).log(), y)}
    with pytest.raises(ValueError, match="loss of task 'depth' is not finite"):
        analyze(model, batches, broken)
    lost = {**dict.fromkeys(TASKS, F.mse_loss), "depth": lambda p, y: F.mse_loss(F.normalize(p, dim=-1, eps=0), y)}
    with torch.no_grad():
        model.heads["depth"].weight.zero_(), model.heads["depth"].bias.zero_()
    with pytest.raises(ValueError, match="loss of task 'depth' is not finite"):
        analyze(model, batches, lost)
    model.heads["depth"].bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="'depth' is not finite: nan, and so is its prediction"):
        analyze(model, batches)
    batches[1][1]["semseg"][0] = torch.inf
    with pytest.raises(ValueError, match="loss of task 'semseg' is not finite: inf"):
        analyze(make_model(), batches)
    model, batches = make_model(), [make_batch(seed=i) for i in range(3)]
    infinite = {**dict.fromkeys(TASKS, F.mse_loss), "depth": lambda p, y: (p / 0).abs().sum()}
    with pytest.raises(ValueError, match="loss of task 'depth' is not finite"):
        analyze(model, batches, infinite)


# --- an early end -----------------------------------------------------------------------------------------------------


class Fighting(nn.Module):
    """A loss whose gradient at the tokens is a vector of its own for each task, plus noise."""

    def __init__(self, direction):
        super().__init__()
        self.direction = direction

    def forward(self, prediction, target):
        return (prediction * (self.direction + 0.1 * target)).sum()


def test_it_ends_when_the_plan_has_settled_and_reads_what_it_says(capsys):
    model = make_model()
    generator = torch.Generator().manual_seed(2)
    losses = {task: Fighting(torch.randn(5, 2, generator=generator).double()) for task in TASKS}
    batches = [make_batch(rows=4, seed=i) for i in range(256)]
    full = analyze(model, batches, losses)
    report = dtme.analyze(model, batches, losses, settle=0.95)
    bars = capsys.readouterr().err
    assert report.settled is True and full.settled is None
    assert report.num_batches < 256 and report.num_batches & (report.num_batches - 1) == 0
    assert report.plan() == full.plan()
    assert "next look at" in bars and "resamples" in bars
    seen = report.num_samples // 4
    exact = analyze(
        model, batches[: max(seen, report.num_batches)], losses, covariance_batches=seen, max_batches=report.num_batches
    )
    same(report, exact)


def test_what_does_not_settle_says_so():
    model, batches = make_model(), [make_batch(rows=1, seed=i) for i in range(12)]
    report = analyze(model, batches, settle=0.99)
    assert report.settled is False and report.num_batches == 12


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"settle": 0.5}, ValueError, "settle must be"),
        ({"settle": True}, ValueError, "settle must be"),
        ({"plan_options": {}}, ValueError, "give settle="),
        ({"settle": 0.9, "plan_options": {"modulation": 2}}, ValueError, "modulation must be a share"),
        ({"settle": 0.9, "plan_options": {"module": 2}}, TypeError, "module"),
        ({"settle": 0.9, "plan_options": 3}, TypeError, "plan_options"),
        ({"ratio": []}, ValueError, "ratio must be one or more"),
        ({"ratio": [1, 1]}, ValueError, "ratio must be one or more different"),
        ({"ratio": [1.0, -1]}, ValueError, "ratio must be a positive"),
        ({"method": "fast"}, ValueError, "method must be one of"),
        ({"autocast": torch.float32}, ValueError, "autocast must be"),
        ({"max_tasks": 1}, ValueError, "max_tasks must be an integer of at least 2"),
    ],
)
def test_bad_options_are_found_before_a_batch_is_read(options, error, says):
    read = []

    class Loader(list):
        def __iter__(self):
            read.append(self)
            return super().__iter__()

    with pytest.raises(error, match=says):
        analyze(make_model(), Loader(make_batch(seed=i) for i in range(8)), **options)
    assert not read


def test_features_that_nobody_sees_into_are_refused_by_name():
    @dataclass
    class Features:
        tokens: torch.Tensor

    model = make_model()
    model.features = lambda backbone, x: Features(backbone(x))
    with pytest.raises(ValueError, match="features returned a Features"):
        analyze(model, [make_batch()])
    model.features = lambda backbone, x: backbone(x).detach()
    with pytest.raises(ValueError, match=r"features \(Tensor\) are not connected to the blocks.*use_reentrant"):
        analyze(model, [make_batch()])


# --- several ratios, one block at a time, many tasks, maps ------------------------------------------------------------


def test_several_ratios_are_those_of_an_analysis_each():
    model, batches = make_model(), [make_batch(seed=i) for i in range(8)]
    report = analyze(model, batches, ratio=(100.0, 2.0, 1e4))
    assert report.ratios == (100.0, 2.0, 1e4)
    for ratio in report.ratios:
        want, got = analyze(model, batches, ratio=ratio), report.at(ratio)
        same(got, want)
        torch.testing.assert_close(got.intervals("null"), want.intervals("null"))


def test_one_block_at_a_time_counts_the_same_with_fewer_tensors(randomise):
    model, batches = make_model(), [make_batch(seed=i) for i in range(8)]
    want = analyze(model, batches)
    before = [vars(block).get("forward") for block in model.backbone.layers]
    same(analyze(model, batches, method="streamed"), want)
    assert [vars(block).get("forward") for block in model.backbone.layers] == before
    dtme.expand(model, want.plan())
    randomise(model)
    same(analyze(model, batches, method="streamed"), analyze(model, batches))

    def kept(method):
        """Numbers that the forward keeps for the backward passes."""
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            analyze(model, batches[:1], method=method)
        return sum(saved)

    assert kept("streamed") < kept("joint") / 4


def test_of_many_tasks_each_batch_counts_some_drawn_at_random():
    tasks = tuple(f"t{i}" for i in range(12))
    model, batches = make_model(tasks), [make_batch(tasks=tasks, seed=i) for i in range(40)]
    full = analyze(model, batches, tasks=tasks)
    with pytest.warns(UserWarning, match=r"12 tasks have 66 pairs.* 15 of 6 tasks drawn at random"):
        drawn = analyze(model, batches, tasks=tasks, max_tasks=6)
    assert (drawn.units.valid.sum((1, 2)) * 66 == full.units.valid.sum((1, 2)) * 15).all()
    pairs = drawn.units.valid[:, 0].sum(0) / full.valid_counts[0, 0, 1]
    assert pairs.min() > 0.05 and pairs.max() < 0.5 and abs(pairs.mean() - 15 / 66) < 1e-6
    low, high = drawn.intervals("range").unbind(1)
    assert ((low < full.range_rates) & (full.range_rates < high)).all()
    assert drawn.skipped == dict.fromkeys(tasks, 0)

    def step(model, batch):
        return {t: F.mse_loss(p, batch[1][t]) for t, p in model(batch[0]).items()}

    with pytest.warns(UserWarning, match="12 tasks have 66 pairs"):
        same(dtme.analyze(model, batches, step, max_tasks=6, progress=False), drawn)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="never among the tasks drawn: read more batches"):
        analyze(model, batches[:3], tasks=tasks, max_tasks=2)


class Maps(nn.Module):
    """A block of maps (B, p, H, W)."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        return x + self.mlp(self.attn(x).tanh())


def test_blocks_of_maps_have_their_channels_on_the_second_axis(randomise):
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(
        nn.Sequential(Maps(), Maps()),
        {task: nn.Conv2d(WIDTH, 2, 1) for task in TASKS},
        features=lambda net, x: net(x),
    ).double()
    batches = [(torch.randn(2, WIDTH, 3, 2).double(), {t: torch.randn(2, 2, 3, 2).double() for t in TASKS})]
    report = analyze(model, batches, ratio=5.0)
    assert report.num_features == {"0": WIDTH, "1": WIDTH}
    (x, targets), block = batches[0], model.backbone[1]
    tokens = model.backbone[0](x).detach().requires_grad_()
    rows = tokens.movedim(1, -1).flatten(0, 2)
    space = dtme_kernels.split_token_space(rows.T @ rows, 5.0)
    grads = []
    for task in TASKS:
        loss = F.mse_loss(model.heads[task](block(tokens)), targets[task])
        grads.append(torch.autograd.grad(loss, tokens)[0].movedim(1, -1))
    counts = dtme_kernels.count_conflicts(torch.stack(grads), space.basis, space.rank)
    assert report.ranks[1] == space.rank and torch.equal(report.range_counts[1], counts.range)
    assert torch.equal(report.null_counts[1], counts.null) and torch.equal(report.valid_counts[1], counts.valid)

    dtme.expand(model, report.plan(modulation=1.0, expansion=0))
    randomise(model)
    for task, prediction in model(x).items():
        hidden = x
        for block in model.backbone:
            weight, bias = (getattr(block.dtme, name)[task][:, None, None] for name in ("weight", "bias"))
            hidden = hidden * weight + bias
            hidden = hidden + block.mlp(block.attn(hidden).tanh())
        torch.testing.assert_close(prediction, model.heads[task](hidden))
    with pytest.raises(ValueError, match=r"block '0' \(Maps\) got tokens \(2, 7, 3, 2\)"):
        model(torch.randn(2, 7, 3, 2).double())


def test_a_model_in_low_precision_counts_nearly_the_same():
    model, batches = make_model().float(), [make_batch(seed=i) for i in range(8)]
    batches = [(x.float(), {t: y.float() for t, y in targets.items()}) for x, targets in batches]
    want, got = analyze(model, batches), analyze(model, batches, autocast=torch.bfloat16)
    assert not torch.equal(got.eigenvalues, want.eigenvalues)
    assert (got.range_rates - want.range_rates).abs().max() < 0.1
