"""Pickles of expanded models, plans and reports: another layout's are refused, saying which release wrote them."""

import copy
import io
import pickle

import pytest
import torch

import dtme
import dtme_kernels
from dtme import pickles
from dtme.block.adapter import BlockAdapter
from dtme.expanded import Expansion
from tests.dtme.reports import made_up

LAYOUTS = {
    BlockAdapter: "name expansion num_features own_tasks weight bias tokens gate running_mean running_var site "
    "plain_norm _block _watched _handles is_dtme_adapter",
    Expansion: "tasks _plan modulator shared_prefix frozen traced has_warned_of_rows "
    "has_warned_of_frozen fingerprint owner_of owners changed",
    dtme.ExpansionPlan: "tasks num_tokens modulation expansion num_features groups",
}
"""Attributes of layout 1."""


def pickled(thing):
    torch.save(thing, file := io.BytesIO())
    return file.getvalue()


def unpickled(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def things(expanded):
    model, _ = expanded("own, generic seam")
    adapter = next(module for module in model.modules() if isinstance(module, BlockAdapter))
    return {
        "model": model,
        "backbone": model.backbone,
        "adapter": adapter,
        "expansion": adapter.expansion,
        "plan": adapter.expansion.plan,
        "report": made_up([0.3], [0.4]),
    }


def test_another_layouts_pickles_are_refused_by_their_release(expanded, monkeypatch):
    found = things(expanded)
    with monkeypatch.context() as patch:
        patch.setattr(pickles, "LAYOUT", 7)
        patch.setattr(dtme_kernels, "__version__", "0.0.3")
        old = {name: (pickled(thing), pickle.dumps(thing)) for name, thing in found.items()}
    for saved, dumped in old.values():
        for load, data in ((unpickled, saved), (pickle.loads, dumped)):
            with pytest.raises(ValueError, match=r"pickled by release 0\.0\.3 .*\(layout 7\).* save_pretrained"):
                load(data)


def test_pickles_from_before_there_were_layouts_are_refused(expanded, monkeypatch):
    found = things(expanded)
    with monkeypatch.context() as patch:
        patch.setattr(pickles.Stamped, "__getstate__", lambda self: dict(vars(self)))
        old = {name: pickled(thing) for name, thing in found.items()}
    for data in old.values():
        with pytest.raises(ValueError, match="pickled by an early release"):
            unpickled(data)


def test_pickles_and_copies_hold_what_they_held(expanded):
    for name, thing in things(expanded).items():
        for other in (unpickled(pickled(thing)), copy.deepcopy(thing), copy.copy(thing)):
            assert vars(other).keys() == vars(thing).keys(), name


def test_the_layout_is_raised_with_the_attributes(expanded):
    """Where this fails, attributes have changed: raise ``pickles.LAYOUT`` and write down those of the new layout."""
    assert pickles.LAYOUT == 1
    module = set(vars(torch.nn.Module()))
    found = {type(thing): vars(thing).keys() - module for thing in things(expanded).values()}
    for kind, names in LAYOUTS.items():
        held = module | set(names.split())
        assert found[kind] <= held, kind
    adapter = things(expanded)["adapter"]
    held = {*adapter._modules, *adapter._buffers, *adapter._parameters, *vars(adapter)} - module
    assert held == set(LAYOUTS[BlockAdapter].split())
    assert found[Expansion] == set(LAYOUTS[Expansion].split())
