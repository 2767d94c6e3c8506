"""The README's code runs as printed."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from tests.dtme.clients import CLIENTS, WIDTH, OwnBlock, OwnTransformer, concatenated

README = Path(__file__).parents[1] / "README.md"
CHANNELS = {"semseg": 5, "depth": 1}


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """Run the code of one section with the names it takes for granted, in an empty folder; all names afterwards."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def run(section, **names):
        text = README.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        names |= {"torch": torch, "dtme": dtme}
        exec(code, names)
        return names

    return run


def batches(*shape):
    return [(torch.randn(2, *shape), {task: torch.randn(2, 5, c) for task, c in CHANNELS.items()}) for _ in range(2)]


def added_to(model):
    return {name.removeprefix("backbone."): p for name, p in model.named_parameters() if ".dtme." in name}


def moved(model):
    """Away from the identity that an expansion starts as."""
    with torch.no_grad():
        for parameter in added_to(model).values():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore")
def test_in_the_loops_of_others(printed, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    from benchmarks.stacks import loops

    model, samples, fresh = loops.expanded_model(), loops.samples(8), loops.plain_model()
    options = {"max_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    names = printed(
        "In the loops of others",
        model=model,
        arguments=TrainingArguments("run4", **options),
        losses=loops.LOSSES,
        samples=samples,
        backbone=fresh.backbone,
        heads=fresh.heads,
    )
    want, found = loops.weights(names["model"]), loops.weights(names["again"])
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


def test_the_example(printed, tmp_path, capsys):
    names = printed(
        "In your code",
        backbone=CLIENTS["transformers ViT"](),
        heads={task: nn.Linear(WIDTH, c) for task, c in CHANNELS.items()},
        losses=dict.fromkeys(CHANNELS, F.mse_loss),
        loader=batches(3, 16, 16),
    )
    assert "range rate" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"conflicts.png", "plan.json", "run1"}
    torch.testing.assert_close(names["single"](names["x"]), names["model"].eval()(names["x"], "depth")["depth"])


def test_how_sure_an_analysis_is(printed, tmp_path):
    loader = [batch for _ in range(4) for batch in batches(3, 16, 16)]
    heads = {task: nn.Linear(WIDTH, c) for task, c in CHANNELS.items()}
    names = printed(
        "How sure an analysis is, and what it costs",
        model=dtme.MultiTaskModel(CLIENTS["transformers ViT"](), heads),
        losses=dict.fromkeys(CHANNELS, F.mse_loss),
        loader=loader,
        batch=loader[0],
    )
    assert (names["low"] < names["high"]).all() and names["chosen"].sum() > 0
    assert names["cheap"].compute() <= 2 and names["cheap"].added_parameters() <= 20_000
    assert len(names["plan"].groups) == len(names["groups"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"run3", "where.png"}


def test_a_whole_model_with_its_own_decoder(printed):
    backbone, loader = OwnTransformer(), batches(5, WIDTH)
    plain, x = copy.deepcopy(backbone), loader[0][0]
    out = {task: nn.Linear(2 * WIDTH, c) for task, c in CHANNELS.items()}

    def decoder(features):
        everything = torch.cat([features[task] for task in CHANNELS], -1)
        return {task: layer(everything) for task, layer in out.items()}

    losses = dict.fromkeys(CHANNELS, F.mse_loss)
    names = printed(
        "A whole model with its own decoder", backbone=backbone, decoder=decoder, loader=loader, losses=losses, x=x
    )
    assert torch.equal(names["depth"], names["predictions"]["depth"])
    again = dtme.MultiTaskModel.from_pretrained("run2", plain, decoder=decoder)
    assert torch.equal(again(x)["depth"], names["depth"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = OwnTransformer()
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, c) for task, c in CHANNELS.items()})

    def forward(self, x):
        x = self.backbone(x)
        return {task: head(x) for task, head in self.heads.items()}


def test_a_model_that_returns_a_dict(printed):
    net, loader = Net(), batches(5, WIDTH)

    def step(net, batch):
        predictions = net(batch[0])
        return {task: F.mse_loss(predictions[task], target) for task, target in batch[1].items()}

    names = printed("A model that returns a dict", net=net, loader=loader, step=step, x=loader[0][0])
    moved(net)
    with dtme.tasks(net, list(CHANNELS)):
        outputs = dtme.split(net(names["x"]), list(CHANNELS))
    assert set(names["predictions"]) == set(CHANNELS)
    plain, added = dtme.collapse(copy.deepcopy(net)), added_to(net)
    for task in CHANNELS:
        with concatenated(plain.backbone, added, task):
            torch.testing.assert_close(outputs[task][task], plain(names["x"])[task], rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 3, 0.3
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class ScoringBlock(OwnBlock):
    def forward(self, x):
        attended, scores = self.attn(self.norm1(x))
        x = x + attended
        return x + self.mlp(self.norm2(x)), scores


def test_attention_that_is_written_out(printed):
    names = printed("Attention that is written out", Attention=Attention)
    block = ScoringBlock(names["Scoring"]()).double()
    backbone, x = nn.ModuleDict({"block": block}), torch.randn(2, 5, WIDTH).double()
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-2, -1) * 0.3
    want = block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    for a, b in zip(block.attn(x), (want, scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    plain = copy.deepcopy(block)
    dtme.expand(backbone, dtme.ExpansionPlan(("depth",), 2, {"block": ("depth",)}, {"block": ("depth",)}))
    tokens = moved(backbone).get_parameter("block.dtme.tokens.depth")
    weight, bias = (backbone.get_parameter(f"block.dtme.{kind}.depth") for kind in ("weight", "bias"))
    with dtme.tasks(backbone, "depth"):
        got, scores = block(x)
    longer, all_scores = plain(torch.cat([x * weight + bias, tokens.expand(2, -1, -1)], 1))
    torch.testing.assert_close(got, longer[:, :5], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores, all_scores[..., :5, :5], rtol=1e-10, atol=1e-10)


def test_rows_text_and_leaving(printed):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, pad_token_id=0, eos_token_id=None)).eval()
    both, block = ("chat", "code"), "model.layers.1"
    moved(dtme.expand(llama, dtme.ExpansionPlan(both, 2, {block: both}, {block: both})))
    heads = {task: nn.Linear(WIDTH, c) for task, c in CHANNELS.items()}
    model, tasks = dtme.MultiTaskModel(CLIENTS["transformers ViT"](), heads).eval(), tuple(CHANNELS)
    moved(dtme.expand(model, dtme.ExpansionPlan(tasks, 2, {"layers.1": tasks}, {"layers.1": tasks})))
    x, prompts = torch.randn(3, 3, 16, 16), torch.randint(1, 50, (2, 5))
    names = printed(
        "Rows with tasks of their own, text, and leaving",
        model=model,
        x=x,
        edges_head=copy.deepcopy(heads["depth"]),
        llama=llama,
        prompts=prompts,
        mask=torch.ones_like(prompts),
    )
    torch.testing.assert_close(names["predictions"]["depth"], model(x[::2], "depth")["depth"])
    torch.testing.assert_close(model(x, "edges")["edges"], model(x, "depth")["depth"])
    torch.testing.assert_close(names["program"].module()(x), model(x, "depth")["depth"])
    for i, task in enumerate(both):
        with dtme.tasks(llama, task):
            assert torch.equal(llama.generate(prompts[i : i + 1], max_new_tokens=8)[0], names["text"][i])


def test_pictures_and_paths_it_names_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file(), path


def test_whether_it_pays(printed, tmp_path, capsys):
    def make_model(seed):
        return dtme.MultiTaskModel(OwnTransformer(), {task: nn.Linear(WIDTH, c) for task, c in CHANNELS.items()})

    names = printed(
        "Does it pay on your tasks",
        make_model=make_model,
        train_loader=batches(5, WIDTH),
        val_loader=batches(5, WIDTH),
        losses=dict.fromkeys(CHANNELS, F.mse_loss),
        mean_iou=lambda predictions, targets: 1 / F.mse_loss(predictions, targets),
        rmse=F.mse_loss,
        steps=4,
    )
    out = capsys.readouterr().out
    assert "Is conflict better than joint training" in out and "\nNext: " in out
    assert names["comparison"].seeds == (0, 1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"compared", "compared.png"}
