"""Methods that combine the gradients of tasks: torchjd's aggregators, GradNorm, loops like LibMTL's."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import default_collate

import dtme
import dtme_kernels

from . import loops
from .loops import LOSSES, TASKS, Batch
from .situation import difference, largest, situation

OWN, TORCHJD = "Loops of one's own", "torchjd"
NEEDED = ("torchjd", "transformers")
Gradients = dict[str, Tensor]


def batch_of(rows: int = 4) -> Batch:
    return default_collate(loops.samples(rows))


def losses_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Of all tasks, from one pass."""
    found = model(batch["pixel_values"])
    return [LOSSES[task](found[task], batch["labels"][task]) for task in TASKS]


def alone(model: dtme.MultiTaskModel, batch: Batch) -> list[Gradients]:
    """The plain loop: for each task the gradients of its loss in a pass of its own, zeros where there are none."""
    named = dict(model.named_parameters())
    rows = []
    for task in TASKS:
        found = torch.autograd.grad(loops.task_loss(model, batch, task), list(named.values()), allow_unused=True)
        pairs = zip(named.items(), found, strict=True)
        rows.append({name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs})
    return rows


def gradients(model: nn.Module) -> Gradients:
    """What a backward pass has left."""
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def flat(tensors: Gradients, names: Sequence[str] | None = None) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in (names or list(tensors))])


def names_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    some = {id(parameter) for parameter in parameters}
    return [name for name, parameter in model.named_parameters() if id(parameter) in some]


def far(model: nn.Module, found: Gradients, want: Gradients) -> float:
    """The difference of shared gradients, and of those of each task, relative to the largest entry of each."""
    parts = [model.shared_parameters(), *(model.task_parameters(task) for task in TASKS)]
    names = [names_of(model, part) for part in parts]
    return max(difference(flat(found, part), flat(want, part)) for part in names)


# --- torchjd ----------------------------------------------------------------------------------------------------------


def by_torchjd(
    model: dtme.MultiTaskModel, losses: list[Tensor], aggregator: nn.Module, chunk: int | None = None
) -> Gradients:
    """The recipe of examples/torchjd_aggregators.py."""
    from torchjd.autojac import backward, jac_to_grad

    model.zero_grad()
    shared = model.shared_parameters()
    own = [parameter for task in model.tasks for parameter in model.task_parameters(task)]
    backward(losses, inputs=shared, retain_graph=True, parallel_chunk_size=chunk)
    jac_to_grad(shared, aggregator)
    torch.stack(losses).sum().backward(inputs=own)
    return gradients(model)


def combined(model: dtme.MultiTaskModel, rows: list[Gradients], aggregator: Callable[[Tensor], Tensor]) -> Gradients:
    """What the aggregator makes of the plain loop's shared gradients, and every task's own."""
    found = {name: torch.stack([row[name] for row in rows]).sum(0) for name in rows[0]}
    shared = names_of(model, model.shared_parameters())
    parts = aggregator(torch.stack([flat(row, shared) for row in rows])).split([found[name].numel() for name in shared])
    return found | {name: part.view_as(found[name]) for name, part in zip(shared, parts, strict=True)}


@situation(
    TORCHJD,
    "Sum on what is shared, of timm and transformers, in parallel and one by one",
    against="a plain loop",
    limit=1e-12,
    needs=(*NEEDED, "timm"),
)
def torchjd_sum() -> float:
    from torchjd.aggregation import Sum

    worst = 0.0
    for make, chunk in itertools.product((loops.vit, loops.timm_vit), (None, 1)):
        model, batch = loops.expanded_model(make()), batch_of()
        want = combined(model, alone(model, batch), lambda rows: rows.sum(0))
        worst = max(worst, far(model, by_torchjd(model, losses_of(model, batch), Sum(), chunk), want))
    return worst


def aggregators() -> dict[str, Callable[[], nn.Module]]:
    """All but those that want a convex solver."""
    from torchjd import aggregation as of

    names = ("AlignedMTL", "ConFIG", "DualProj", "GradDrop", "GradVac", "IMTLG", "MGDA", "Mean", "PCD", "PCGrad")
    found = {name: getattr(of, name) for name in (*names, "Random", "Sum", "UPGrad")}
    found["Constant"] = lambda: of.Constant(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    found["Krum"] = lambda: of.Krum(n_byzantine=0, n_selected=2)
    found["TrimmedMean"] = lambda: of.TrimmedMean(trim_number=1)
    return found


@situation(
    TORCHJD,
    "sixteen aggregators on what is shared",
    against="the same on a plain loop's rows",
    limit=1e-9,
    needs=(*NEEDED, "quadprog"),
)
def torchjd_aggregators() -> float:
    model, batch = loops.expanded_model(), batch_of()
    rows, worst = alone(model, batch), 0.0
    for make in aggregators().values():
        found = []
        for run in (
            lambda one: by_torchjd(model, losses_of(model, batch), one),
            lambda one: combined(model, rows, one),
        ):
            torch.manual_seed(5)  # some draw
            found.append(run(make()))
        worst = max(worst, far(model, *found))
    return worst


@situation(
    TORCHJD,
    "mtl_backward, the streams' features as its cut, two tasks in a group",
    against="PCGrad on a plain loop's rows",
    limit=1e-9,
    needs=NEEDED,
)
def torchjd_mtl_backward() -> float:
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    model, batch = loops.expanded_model(groups={"surfaces": TASKS[:2]}), batch_of()
    rows = alone(model, batch)
    features = model.extract(batch["pixel_values"], TASKS)
    found = model.predict(features, TASKS)
    losses = [LOSSES[task](found[task], batch["labels"][task]) for task in TASKS]
    shared = model.shared_parameters()
    own = [model.task_parameters(task) for task in TASKS]
    mtl_backward(
        losses, list(dict.fromkeys(features.values())), tasks_params=own, shared_params=shared, retain_graph=True
    )
    torch.manual_seed(5)
    jac_to_grad(shared, PCGrad())
    torch.manual_seed(5)
    return far(model, gradients(model), combined(model, rows, PCGrad()))


# --- loops of one's own -----------------------------------------------------------------------------------------------


@situation(
    OWN, "PCGrad by hand, task by task with retain_graph", against="a plain loop", limit=1e-12, needs=("transformers",)
)
def pcgrad_by_hand() -> float:
    def project(rows: Tensor) -> Tensor:
        parts = []
        for i, row in enumerate(rows):
            for j in (1, 2, 0):
                if j != i and (dot := row @ rows[j]) < 0:
                    row = row - dot / (rows[j] @ rows[j]) * rows[j]
            parts.append(row)
        return torch.stack(parts).sum(0)

    model, batch = loops.expanded_model(), batch_of()
    rows = []
    for loss in losses_of(model, batch):
        model.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(gradients(model))
    return far(model, combined(model, rows, project), combined(model, alone(model, batch), project))


@situation(
    OWN,
    "gradients of the representation first, then the backbone once, as LibMTL's rep_grad",
    against="a plain loop",
    limit=1e-12,
    needs=("transformers",),
)
def representation_gradients() -> float:
    model, batch = loops.expanded_model(), batch_of()
    weights = dict(zip(TASKS, (0.3, 1.2, 0.7), strict=True))
    features = model.extract(batch["pixel_values"], TASKS)
    cut = {task: value.detach().requires_grad_() for task, value in features.items()}
    for task in TASKS:
        LOSSES[task](model.predict({task: cut[task]}, [task])[task], batch["labels"][task]).backward()
    torch.autograd.backward(list(features.values()), [weights[task] * cut[task].grad for task in TASKS])
    found = gradients(model)
    rows = alone(model, batch)
    want = {
        name: sum(
            (1.0 if name.startswith("heads.") else weights[t]) * row[name] for t, row in zip(TASKS, rows, strict=True)
        )
        for name in found
    }
    return far(model, found, want)


def gradnorm_weights(norms: Tensor, losses: Tensor, first: Tensor) -> Tensor:
    """The loss of GradNorm's weights (alpha = 1.5), whose targets are constants."""
    ratios = losses.detach() / first
    target = norms.detach().mean() * (ratios / ratios.mean()) ** 1.5
    return (norms - target).abs().sum()


@situation(
    OWN,
    "GradNorm at the last block, by differentiating twice",
    against="norms of a plain loop's gradients",
    limit=1e-12,
    needs=("transformers",),
)
def gradnorm() -> float:
    """Where streams have parted, a block's own weights are still those of all tasks: they are the last shared ones."""
    models = [loops.expanded_model() for _ in range(2)]
    task_weights = [torch.ones(len(TASKS), dtype=torch.float64, requires_grad=True) for _ in models]
    optimizers = [torch.optim.SGD([*m.parameters(), w], lr=1e-2) for m, w in zip(models, task_weights, strict=True)]
    shared = [{id(p) for p in model.shared_parameters()} for model in models]
    last = [[p for p in m.backbone.layers[-1].parameters() if id(p) in s] for m, s in zip(models, shared, strict=True)]
    names = names_of(models[1], last[1])
    first = torch.stack(losses_of(models[0], batch_of())).detach()
    for _ in range(3):
        with dtme_kernels.implementation("reference"):
            losses = torch.stack(losses_of(models[0], batch_of())) * task_weights[0]
            parts = [torch.autograd.grad(loss, last[0], create_graph=True) for loss in losses]
            norms = torch.stack([torch.cat([g.flatten() for g in part]).norm() for part in parts])
            optimizers[0].zero_grad()
            (of_weights,) = torch.autograd.grad(
                gradnorm_weights(norms, losses / task_weights[0], first), task_weights[0], retain_graph=True
            )
            losses.sum().backward()
        task_weights[0].grad = of_weights
        rows = alone(models[1], batch_of())
        norms = torch.stack([flat(row, names).norm() for row in rows]) * task_weights[1]
        plain = torch.stack([loops.task_loss(models[1], batch_of(), task) for task in TASKS])
        optimizers[1].zero_grad()
        gradnorm_weights(norms, plain, first).backward()
        for name, parameter in models[1].named_parameters():
            parameter.grad = sum(w * row[name] for w, row in zip(task_weights[1].detach(), rows, strict=True))
        for optimizer, weight in zip(optimizers, task_weights, strict=True):
            optimizer.step()
            with torch.no_grad():
                weight *= len(TASKS) / weight.sum()
    trained = [loops.weights(m) | {"task weights": w} for m, w in zip(models, task_weights, strict=True)]
    return largest(*trained)


@situation(OWN, "uncertainty weighting, trained along", against="a plain loop", limit=1e-12, needs=("transformers",))
def uncertainty() -> float:
    models = [loops.expanded_model() for _ in range(2)]
    logs = [torch.zeros(len(TASKS), dtype=torch.float64, requires_grad=True) for _ in models]
    for together, model, log in zip((True, False), models, logs, strict=True):
        optimizer = torch.optim.Adam([*model.parameter_groups(lr=1e-2), {"params": [log], "lr": 1e-2}], eps=loops.EPS)
        for _ in range(3):
            optimizer.zero_grad()
            if together:
                losses = torch.stack(losses_of(model, batch_of()))
                (losses / (2 * log.exp()) + log / 2).sum().backward()
            else:
                for task, one in zip(TASKS, range(len(TASKS)), strict=True):
                    (loops.task_loss(model, batch_of(), task) / (2 * log[one].exp()) + log[one] / 2).backward()
            optimizer.step()
    trained = [loops.weights(m) | {"log variances": log} for m, log in zip(models, logs, strict=True)]
    return largest(*trained)


@situation(
    OWN,
    "Adam on another subset of the tasks in every step, the others' weights untouched",
    against="a plain loop",
    limit=1e-12,
    needs=("transformers",),
)
def subsets_of_tasks() -> float:
    model, plain = loops.expanded_model(), loops.expanded_model()
    optimizer, steps = loops.optimizer_of(model), []
    for step, some in enumerate((TASKS[:2], TASKS[2:], TASKS[::2], TASKS[1:2], TASKS)):
        batch = {"pixel_values": loops.images(4, step), "labels": {task: torch.ones(4, 2).double() for task in some}}
        steps.append([batch])
        before = loops.weights(model)
        found = model(batch["pixel_values"], some)
        optimizer.zero_grad()
        torch.stack([LOSSES[task](found[task], batch["labels"][task]) for task in some]).sum().backward()
        optimizer.step()
        resting = [parameter for task in TASKS if task not in some for parameter in model.task_parameters(task)]
        after = loops.weights(model)
        if any(not torch.equal(before[name], after[name]) for name in names_of(model, resting)):
            return float("inf")
    loops.train(plain, steps)
    return largest(loops.weights(model), loops.weights(plain))


@situation(
    OWN,
    "a moving average of the weights",
    against="a model of the averaged weights",
    limit=1e-12,
    needs=("transformers",),
)
def moving_average() -> float:
    model, want = loops.expanded_model(), loops.expanded_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first time it copies
    expected = loops.weights(model)
    optimizer = loops.optimizer_of(model)
    for _ in range(3):
        loops.train(model, [[batch_of()]], optimizer=optimizer)
        average.update_parameters(model)
        expected = {name: (expected[name] + value) / 2 for name, value in loops.weights(model).items()}
    with torch.no_grad():
        for name, parameter in want.named_parameters():
            parameter.copy_(expected[name])
    return largest(loops.predictions(average), loops.predictions(want))


@situation(OWN, "bfloat16 by autocast, losses scaled", against="no scaling", limit=0.0, needs=("transformers",))
def scaled_losses() -> float:
    """A scale that is a power of two changes no bit; one overflow in the middle is a step that is left out."""
    trained = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**12), torch.amp.GradScaler("cpu", enabled=False)):
        model = loops.expanded_model(dtype=torch.float32)
        optimizer = loops.optimizer_of(model)
        batch = default_collate(loops.samples(4, torch.float32))
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.stack(losses_of(model, batch)).float().sum()
            if step == 2 and not scaler.is_enabled():
                continue
            scaler.scale(loss * float("inf") if step == 2 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        trained.append(loops.weights(model))
    return 0.0 if all(torch.equal(trained[0][name], trained[1][name]) for name in trained[1]) else float("inf")
