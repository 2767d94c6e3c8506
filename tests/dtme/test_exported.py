"""What an exported task is made of, how it is called, and what it refuses."""

import operator

import pytest
import torch
from torch import nn

import dtme
from dtme.block.attention import OwnTokens
from dtme.streams import adapters
from tests.dtme.clients import TASKS, WIDTH, OwnTransformer


def operators(single, x):
    program = torch.export.export(single, (x,))
    called = {node.target for node in program.graph.nodes if node.op == "call_function"} - {operator.getitem}
    return {one.namespace for one in called}


def test_plain_means_torchs_own_operators(expanded):
    model, x = expanded("timm ViT")
    assert operators(model.export_task("depth", plain=True), x) == {"aten"}
    assert operators(model.export_task("depth"), x) == {"aten", "dtme"}


@pytest.mark.parametrize("plain", [False, True])
def test_of_other_tasks_nothing_stays(expanded, plain):
    model, _ = expanded("own, generic seam")
    single = model.export_task("semseg", plain=plain)
    assert not dtme.is_expanded(single) and not adapters(single)
    names = {name for name in single.state_dict() if ".dtme." in name}
    layer = "backbone.layers.1.dtme"
    parts = ("weight.semseg", "bias.semseg", "task_key", "task_value")
    assert names == {f"{layer}.{part}" for part in parts}  # the first block is another task's, the third the others'
    assert [hasattr(block, "dtme") for block in single.backbone.layers] == [False, True, False]
    assert "forward" not in vars(single.backbone.layers[2].attn)


@pytest.mark.parametrize("plain", [False, True])
def test_inputs_come_in_one_or_by_name(expanded, plain):
    model, x = expanded("transformers BERT")
    single = model.export_task("depth", plain=plain)
    assert torch.equal(single(**x), single(x))
    with pytest.raises(TypeError, match="nothing beside x, got 'attention_mask' too"):
        single(x["input_ids"], attention_mask=x["attention_mask"])
    batch, length = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("length", min=2, max=16)
    shapes = {name: {0: batch, 1: length} for name in x}
    program = torch.export.export(single, (), x, dynamic_shapes=shapes).module()
    other = {name: value[:2, :5] for name, value in x.items()}
    torch.testing.assert_close(program(**other), model(other, "depth")["depth"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plain", [False, True])
def test_padded_batches_of_torchs_encoder_stay_as_they_are(randomise, plain):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 24, 0.0, batch_first=True), 2)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    torch.manual_seed(0)
    model = dtme.MultiTaskModel(Padded(), {"a": nn.Identity(), "b": nn.Identity()}).double().eval()
    dtme.expand(model, dtme.ExpansionPlan(("a", "b"), 2, {}, {"encoder.layers.1": ("a", "b")}))
    randomise(model)
    x = {"x": torch.randn(2, 5, WIDTH).double(), "padding": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
    with torch.no_grad():  # with gradients torch packs nothing
        want = model(x, "a")["a"]
        torch.testing.assert_close(model.export_task("a", plain=plain)(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_statistics_of_a_batch_norm_are_constants(build, randomise, plain):
    model, x = build("own, generic seam")
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {"layers.0": TASKS}, {"layers.1": TASKS}), modulator="batch_norm")
    randomise(model)
    model.train()(3 * x + 1)
    want = model.eval()(x, "depth")["depth"]
    single = model.export_task("depth", plain=plain)
    single.train()(x - 5)
    torch.testing.assert_close(single(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_a_replaced_attention_is_refused_not_run_without_task_tokens(expanded, plain):
    model, x = expanded("own, generic seam")
    single = model.export_task("depth", plain=plain)
    single.backbone.layers[1].attn = OwnTransformer(1).double().layers[0].attn
    with pytest.raises(RuntimeError, match=r"the attention of block 'layers\.1' was replaced"):
        single(x)


def test_other_keys_than_the_blocks_own_are_refused(expanded):
    model, _ = expanded("transformers BERT")
    attention = model.export_task("depth", plain=True).backbone.encoder.layer[1].attention.self
    query, key = torch.zeros(3, 3, 1, 8).double(), torch.zeros(3, 3, 4, 8).double()
    with pytest.raises(ValueError, match=r"block 'encoder.layer.1': .* 1 queries for 4 keys"):
        attention.forward.__self__._attend(OwnTokens("encoder.layer.1", is_square=True))(query, key, key)


@pytest.mark.parametrize("client", ["timm ViT", "own, generic seam"])
def test_a_plain_task_compiles_in_one_graph_and_runs_in_low_precision(expanded, client):
    model, x = expanded(client)
    single = model.export_task("depth", plain=True)
    compiled = torch.compile(single, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), single(x), rtol=1e-10, atol=1e-10)
    low, want = single.bfloat16()(x.bfloat16()), model(x, "depth")["depth"]
    assert low.dtype == torch.bfloat16 and (low - want).abs().mean() < 0.1 * want.abs().mean()
