"""Functions for features, methods and decoders of real backbones."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from dtme.trees import tensors
from tests.dtme.backbones import (
    LENGTH,
    timm_vit,
)
from tests.dtme.clients import TASKS, WIDTH


def test_methods_that_run_no_block_leave_rows_alone():
    vit = timm_vit().double().eval()
    dtme.expand(vit, dtme.ExpansionPlan(TASKS, 2, {"blocks.1": TASKS}))
    x = torch.randn(2, 3, 32, 32).double()
    with dtme.tasks(vit, TASKS):
        assert len(vit.forward_head(vit.forward_features(x))) == len(vit(x)) == 3 * len(x)


def last_map(vit, x):
    return vit.forward_intermediates(x, indices=[3], intermediates_only=True)


FEATURES = {
    "reshaped by the batch of the input": lambda vit, x: vit.forward_features(x).reshape(len(x), -1, WIDTH).mean(1),
    "viewed as maps": lambda vit, x: vit.forward_features(x)[:, 1:].view(len(x), 4, 4, WIDTH).permute(0, 3, 1, 2),
    "beside a skip of the input": lambda vit, x: vit.forward_features(x).mean(1) + x.mean((1, 2, 3))[:, None],
    "tokens and pixels": lambda vit, x: (vit.forward_features(x)[:, 0], x.mean((2, 3))),
    "the last map": last_map,
    "maps of all blocks": lambda vit, x: vit.forward_intermediates(x, intermediates_only=True),
    "tokens of two blocks": lambda vit, x: vit.forward_intermediates(
        x, indices=[0, 2], output_fmt="NLC", intermediates_only=True
    ),
    "a map and the tokens": lambda vit, x: vit.forward_intermediates(x, indices=[1]),
    "stopped early": lambda vit, x: vit.forward_intermediates(
        x, indices=[1], stop_early=True, output_fmt="NLC", intermediates_only=True
    ),
    "flattened over the batch": lambda vit, x: vit.forward_features(x).flatten(0, 1).view(len(x), -1),
    "standardised over the batch": lambda vit, x: F.normalize(vit.forward_features(x)[:, 0], dim=0),
}


@pytest.mark.parametrize("name", FEATURES)
def test_functions_for_features_see_one_number_of_rows(name):
    model = dtme.MultiTaskModel(timm_vit(), {task: nn.Identity() for task in TASKS}, FEATURES[name]).double().eval()
    plan = dtme.ExpansionPlan(TASKS, 2, {"blocks.0": TASKS[:2], "blocks.3": TASKS}, {"blocks.1": TASKS[:1]})
    dtme.expand(model, plan)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    for rows in (6, 1, 3):
        x = torch.randn(rows, 3, 32, 32).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            at_once = model(x)
        for task in TASKS:
            for got, want in zip(tensors(at_once[task]), tensors(model(x, task)[task]), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_methods_called_in_any_order_under_one_choice():
    vit = timm_vit().double().eval()
    dtme.expand(vit, dtme.ExpansionPlan(TASKS, 2, {"blocks.0": TASKS, "blocks.3": TASKS}, {"blocks.1": TASKS}))
    x, tap = torch.randn(3, 3, 32, 32).double(), {"indices": [1], "output_fmt": "NLC", "intermediates_only": True}
    with torch.no_grad():
        for parameter in (p for n, p in vit.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    calls = {
        "all blocks": lambda: vit.forward_intermediates(x, **tap)[0],
        "stopped early": lambda: vit.forward_intermediates(x, stop_early=True, **tap)[0],
        "the whole": lambda: vit(x),
        "features": lambda: vit.forward_features(x),
    }
    want = {}
    for name, call in calls.items():
        for task in TASKS:
            with dtme.tasks(vit, task):
                want[name, task] = call()
    with dtme.tasks(vit, TASKS):
        for name in ["stopped early", "stopped early", "all blocks", "the whole", "stopped early", "features", *calls]:
            for task, got in dtme.split(calls[name](), TASKS).items():
                torch.testing.assert_close(got, want[name, task], rtol=1e-9, atol=1e-9)


class Detector(nn.Module):
    """Queries of its own attend to what the encoder makes of the image."""

    def __init__(self):
        super().__init__()
        options = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, 3, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 3, **options), 2)
        self.queries = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x):
        return self.decoder(self.queries.expand(len(x), -1, -1), self.encoder(x))


@pytest.mark.parametrize("rows", [6, 4, 1])
def test_decoders_that_attend_to_an_expanded_encoder(rows):
    torch.manual_seed(0)
    detector, x = Detector().double().eval(), torch.randn(rows, LENGTH, WIDTH).double()
    dtme.expand(detector, dtme.ExpansionPlan(TASKS, 2, {"encoder.layers.0": TASKS}, {"encoder.layers.1": ("depth",)}))
    with torch.no_grad():
        for parameter in (p for n, p in detector.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    with warnings.catch_warnings(), dtme.tasks(detector, TASKS):
        warnings.simplefilter("ignore")
        parts = dtme.split(detector(x), TASKS)
    for task in TASKS:
        with dtme.tasks(detector.encoder, task):
            memory = detector.encoder(x)
        want = detector.decoder(detector.queries.expand(rows, -1, -1), memory)
        torch.testing.assert_close(parts[task], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("chosen", [["layers.0"], ["layers.2"], ["layers.0", "layers.1"]], ids=str)
def test_encoders_that_would_pack_padded_batches(gradients, chosen):
    """torch's encoder as it comes makes nested tensors of a padded batch, in evaluation mode at least."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 48, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3).double().eval()
    before = dict(vars(encoder))
    x, hidden = torch.randn(3, 5, WIDTH).double(), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    dtme.expand(encoder, dtme.ExpansionPlan(TASKS, 2, dict.fromkeys(chosen, TASKS), {chosen[-1]: TASKS[:1]}))
    with torch.no_grad():
        for parameter in (p for n, p in encoder.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    added = {n: p.detach() for n, p in encoder.named_parameters() if ".dtme." in n}
    with torch.set_grad_enabled(gradients), dtme.tasks(encoder, TASKS):
        parts = dtme.split(encoder(x, src_key_padding_mask=hidden), TASKS)
    dtme.collapse(encoder)
    assert dict(vars(encoder)) == before
    for task in TASKS:
        y = x
        for i, block in enumerate(encoder.layers):
            w, b, tokens = (added.get(f"layers.{i}.dtme.{kind}.{task}") for kind in ("weight", "bias", "tokens"))
            y = y if w is None else y * w + b
            tokens = x[0, :0] if tokens is None else tokens
            longer = F.pad(hidden, (0, len(tokens)))
            y = block(torch.cat([y, tokens.expand(3, -1, -1)], 1), src_key_padding_mask=longer)[:, :5]
        torch.testing.assert_close(parts[task][~hidden], y[~hidden], rtol=1e-10, atol=1e-10)
