"""Low-rank adapters of PEFT, before and after a model is expanded."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import dtme
from benchmarks.models.oracle import joined, keys_values
from benchmarks.models.subject import Subject, randomise

from .situation import difference, largest, situation
from .small import TASKS, added_of, features_of, heads, images, move, plan_of, predict, vit

NEEDS = ("peft", "transformers")
Wrap = Callable[[nn.Module], Any]


def lora(module: nn.Module, seed: int = 3, **options: Any) -> Any:
    """``module`` under PEFT, with adapters that do something."""
    from peft import LoraConfig, get_peft_model

    targets = options.pop("target_modules", ["q_proj", "v_proj", "o_proj"])
    torch.manual_seed(seed)
    wrapped = get_peft_model(module, LoraConfig(r=4, target_modules=targets, **options))  # type: ignore[arg-type]
    move(wrapped, "lora_", seed)
    return wrapped


def wrapped_first(wrap: Wrap = lora, wrapped_names: bool = False) -> dtme.MultiTaskModel:
    """LoRA, then ``expand``; by the names of blocks that the bare backbone has, or of the wrapped one."""
    backbone = wrap(vit())
    model = dtme.MultiTaskModel(backbone, heads()).eval()
    dtme.expand(model, plan_of(backbone if wrapped_names else vit()))
    move(model, ".dtme.")
    return model


def expanded_first(wrap: Wrap = lora, wrapped_names: bool = False) -> dtme.MultiTaskModel:
    """``expand``, then LoRA, which freezes what was added."""
    model = dtme.MultiTaskModel(vit(), heads()).eval()
    dtme.expand(model, plan_of(wrap(vit()) if wrapped_names else vit()))
    move(model, ".dtme.")
    model.backbone = wrap(model.backbone)
    return dtme.unfreeze(model)


def around(wrap: Wrap = lora) -> Any:
    """PEFT around the whole multi-task model."""
    model = wrap(dtme.MultiTaskModel(vit(), heads()).eval())
    dtme.expand(model, plan_of(vit()))
    move(model, ".dtme.")
    return model


def trained_by_plain_hooks(model: Any) -> dict[str, Tensor]:
    return predict(lora(vit()), heads(), added_of(model.backbone), images())


@situation(
    "PEFT", "LoRA before expand, after it, around all; plans by either names", against="plain hooks", limit=1e-12,
    needs=NEEDS,
)  # fmt: skip
def orders() -> float:
    models = [make(lora, names) for make in (wrapped_first, expanded_first) for names in (False, True)]
    found = [largest(model(images()), trained_by_plain_hooks(model)) for model in models]
    whole = around()
    return max(*found, largest(whole(images()), trained_by_plain_hooks(whole.base_model.model)))


def gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of those that have one."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def squares(predictions: dict[str, Tensor]) -> Tensor:
    return sum(((i + 1) * x.square()).mean() for i, x in enumerate(predictions.values()))  # type: ignore[return-value]


def trainable(module: nn.Module, but: str = " ") -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad and but not in name}


def against_a_loop(model: dtme.MultiTaskModel, wrap: Wrap) -> float:
    """Gradients of all that trains, of all tasks at once, against those of one task after the other by plain hooks."""
    bare, plain_heads = wrap(vit()), nn.ModuleDict(heads())
    added = {name: x.detach().clone().requires_grad_() for name, x in added_of(model.backbone).items()}
    want = gradients(squares(predict(bare, plain_heads, added, images())), {
        **{f"backbone.{name}": x for name, x in trainable(bare).items()},
        **{f"heads.{name}": x for name, x in plain_heads.named_parameters()},
        **{f"backbone.base_model.model.{name}": x for name, x in added.items()},
    })  # fmt: skip
    return largest(gradients(squares(model(images())), trainable(model)), want)


@situation(
    "PEFT", "gradients of LoRA and of what was added, before and after", against="a loop over tasks by plain hooks",
    limit=1e-12, needs=NEEDS,
)  # fmt: skip
def gradients_of_lora() -> float:
    return max(against_a_loop(make(), lora) for make in (wrapped_first, expanded_first))


def dora(module: nn.Module) -> Any:
    return lora(module, use_dora=True)


@situation("PEFT", "gradients of DoRA", against="a loop over tasks by plain hooks", limit=1e-12, needs=NEEDS)
def gradients_of_dora() -> float:
    return against_a_loop(wrapped_first(dora), dora)


@situation("PEFT", "merge_and_unload, then saved, loaded, exported", against="before", limit=1e-12, needs=NEEDS)
def merged() -> float:
    worst = 0.0
    for make in (wrapped_first, expanded_first):
        model, x = make(), images()
        want = model(x)
        model.backbone = model.backbone.merge_and_unload()  # type: ignore[operator]
        single = model.export_task(TASKS[0], plain=True)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = dtme.MultiTaskModel.from_pretrained(folder, vit(5), heads()).eval()
        worst = max(worst, largest(model(x), want), largest(again(x), want), difference(single(x), want[TASKS[0]]))
        dtme.replan(model, plan_of(lora(vit())))
        worst = max(worst, largest(model(x), want))
    return worst


@situation("PEFT", "two adapters by turns, and none", against="plain hooks", limit=1e-12, needs=NEEDS)
def switched() -> float:
    from peft import LoraConfig

    def two(module: nn.Module) -> Any:
        wrapped = lora(module)
        wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
        move(wrapped, ".other.", 9)
        return wrapped

    model, bare = wrapped_first(two), two(vit())
    added, found = added_of(model.backbone), []
    for name in ("other", "default"):
        model.backbone.set_adapter(name), bare.set_adapter(name)  # type: ignore[operator]
        found.append(largest(model(images()), predict(bare, heads(), added, images())))
    with model.backbone.disable_adapter(), bare.disable_adapter():  # type: ignore[operator]
        found.append(largest(model(images()), predict(bare, heads(), added, images())))
    return max(found)


@situation("PEFT", "a step with heads as modules_to_save", against="the step by plain hooks", limit=1e-12, needs=NEEDS)
def saved_heads() -> float:
    def wrap(module: nn.Module) -> Any:
        return lora(module, modules_to_save=[f"heads.{task}" for task in TASKS])

    model, bare, plain_heads = around(wrap), lora(vit()), nn.ModuleDict(heads())
    added = {name: x.detach().clone().requires_grad_() for name, x in added_of(model.base_model.model.backbone).items()}
    optimizer = torch.optim.SGD(model.base_model.model.parameter_groups(lr=0.1, weight_decay=0.0))
    squares(model(images())).backward()
    optimizer.step()
    squares(predict(bare, plain_heads, added, images())).backward()
    torch.optim.SGD([*trainable(bare).values(), *plain_heads.parameters(), *added.values()], lr=0.1).step()
    return largest(model(images()), predict(bare, plain_heads, added, images()))


@contextmanager
def files_of(model: dtme.MultiTaskModel) -> Iterator[tuple[str, str]]:
    """What was added, by this package; LoRA's weights, by PEFT, which leaves the rest out."""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        model.save_pretrained(ours, expansion_only=True)
        model.backbone.save_pretrained(theirs)  # type: ignore[operator]
        yield ours, theirs


@situation("PEFT", "what was added in our files, LoRA in PEFT's; any order", against="before", limit=0.0, needs=NEEDS)
def saved_apart() -> float:
    from peft import PeftModel

    worst = 0.0
    for make in (wrapped_first, expanded_first):
        model = make()
        want = model(images())
        with files_of(model) as (ours, theirs):
            first = dtme.MultiTaskModel.from_pretrained(ours, PeftModel.from_pretrained(vit(), theirs), model.heads)
            second = dtme.MultiTaskModel.from_pretrained(ours, vit(), model.heads)
            second.backbone = PeftModel.from_pretrained(second.backbone, theirs)
        worst = max(worst, *(largest(again.eval()(images()), want) for again in (first, second)))
    return worst


@situation("PEFT", "GPT-2's Conv1D under LoRA", against="keys and values joined by hand", limit=1e-12, needs=NEEDS)
def convolutions() -> float:
    from transformers import GPT2Config, GPT2Model

    def make() -> Any:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=3, n_head=3, use_cache=False)
        model = GPT2Model(config).double().eval()
        randomise(model)
        return lora(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)

    ids = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(0))
    bare, model = make(), dtme.MultiTaskModel(make(), heads()).eval()
    plan = dtme.ExpansionPlan(TASKS, 2, {}, {"h.1": TASKS})
    dtme.expand(model, plan)
    move(model, ".dtme.")
    added, inner = added_of(model.backbone), bare.get_base_model()
    subject = Subject("transformers/gpt2", inner, lambda rows: ids[:rows])
    want = {}
    for task, head in model.heads.items():
        keys = keys_values(subject, inner, "h.1", added[f"h.1.dtme.tokens.{task}"].detach())
        with joined(inner, {"h.1": keys}):
            want[task] = head(features_of(inner, ids))
    return largest(model(ids), want)


@situation("PEFT", "an analysis under LoRA; its plan bare and wrapped", against="LoRA merged", limit=1e-9, needs=NEEDS)
def analysed() -> float:
    losses = {task: nn.functional.mse_loss for task in TASKS}
    batches = [
        (images(rows), {task: torch.ones(rows, 5, 2 + i).double() for i, task in enumerate(TASKS)}) for rows in (2, 3)
    ]
    model = dtme.MultiTaskModel(lora(vit()), heads()).eval()
    plain = dtme.MultiTaskModel(lora(vit()).merge_and_unload(), heads()).eval()
    report, want = (dtme.analyze(one, batches, losses, progress=False) for one in (model, plain))
    counts = largest(
        {"range": report.range_counts, "null": report.null_counts},
        {"range": want.range_counts, "null": want.null_counts},
    )
    plans = [one.plan(num_tokens=2) for one in (report, want)]
    models = []
    for one, plan in itertools.product((model, plain), plans):
        torch.manual_seed(0)
        models.append(dtme.expand(copy.deepcopy(one), plan))
        move(models[-1], ".dtme.")
    return max(counts, *(largest(one(images()), models[0](images())) for one in models))
