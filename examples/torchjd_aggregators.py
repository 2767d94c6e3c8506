"""torchjd's aggregators on what tasks still share: ``python examples/torchjd_aggregators.py``.

Task tokens and modulations take conflicts out of the blocks that have most of them. What is left of them is in the
parameters that all tasks use, and there an aggregator combines the gradients of the tasks. Parameters of one task alone
have one gradient, and nothing to combine.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchjd import aggregation
from torchjd.aggregation import Aggregator
from torchjd.autojac import backward, jac_to_grad

import dtme

WIDTH, STEPS = 32, 20
LOSSES = {"mean": nn.functional.mse_loss, "spread": nn.functional.mse_loss, "sign": nn.functional.cross_entropy}
AGGREGATORS = {
    "Sum": {},
    "UPGrad": {},
    "MGDA": {},
    "PCGrad": {},
    "CAGrad": {"c": 0.4},
    "NashMTL": {"n_tasks": len(LOSSES)},
    "IMTLG": {},
    "AlignedMTL": {},
    "ConFIG": {},
    "GradDrop": {},
    "DualProj": {},
}
"""With their options; some want a solver, which ``pip install "torchjd[full]"`` brings along."""
Batch = tuple[Tensor, dict[str, Tensor]]


def train_step(
    model: dtme.MultiTaskModel, optimizer: torch.optim.Optimizer, aggregator: Aggregator, batch: Batch
) -> list[float]:
    """The losses before the step."""
    x, targets = batch
    predictions = model(x)
    losses = [LOSSES[task](predictions[task], targets[task]) for task in model.tasks]
    shared = [parameter for parameter in model.shared_parameters() if parameter.requires_grad]
    own = [p for task in model.tasks for p in model.task_parameters(task) if p.requires_grad]
    optimizer.zero_grad()
    # A row per task. torchjd's mtl_backward would by default take for shared whatever is used before its `features`:
    # what expand added to the backbone for one task, too. Rows one after the other, by parallel_chunk_size=1, are as
    # fast as in parallel, where torch.vmap makes a loop of attention anyway; and vmap cannot follow compiled code.
    backward(losses, inputs=shared, retain_graph=True, parallel_chunk_size=1)
    jac_to_grad(shared, aggregator)
    torch.stack(losses).sum().backward(inputs=own)  # each of them gets the gradient of its task
    optimizer.step()
    return [loss.item() for loss in losses]


def make_model() -> dtme.MultiTaskModel:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    heads = {"mean": nn.Linear(WIDTH, 1), "spread": nn.Linear(WIDTH, 1), "sign": nn.Linear(WIDTH, 2)}
    return dtme.MultiTaskModel(encoder, heads, features=lambda net, x: net(x).mean(1))


def make_batches(count: int) -> Iterator[Batch]:
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        spread = torch.rand(16, 1, generator=random) + 0.5
        x = torch.randn(16, 6, WIDTH, generator=random) * spread[..., None]
        sign = (x[..., 8].mean(1) > 0).long()
        yield x, {"mean": 3 * x[..., :8].mean((1, 2))[:, None], "spread": spread, "sign": sign}


def main() -> None:
    model = make_model()
    report = dtme.analyze(model, list(make_batches(8)), LOSSES, progress=False)
    dtme.expand(model, report.plan(num_tokens=2))
    shared = sum(parameter.numel() for parameter in model.shared_parameters())
    own = {task: sum(p.numel() for p in model.task_parameters(task)) for task in model.tasks}
    print(f"{shared:,} parameters are shared; of one task alone are {own}")
    print(f"losses after {STEPS} steps" + "".join(f"{task:>10}" for task in model.tasks))
    for name, options in AGGREGATORS.items():
        try:
            aggregator = getattr(aggregation, name)(**options)
        except ImportError as error:
            print(f"{name}: left out, {str(error).splitlines()[0]}")
            continue
        torch.manual_seed(0)  # some draw
        trained = copy.deepcopy(model)
        optimizer = torch.optim.Adam(trained.parameter_groups(lr=3e-3))
        seen = [train_step(trained, optimizer, aggregator, batch) for batch in make_batches(STEPS)]
        last = torch.tensor(seen[-8:]).mean(0).tolist()
        print(f"{name:>21}" + "".join(f"{loss:>10.3f}" for loss in last))


if __name__ == "__main__":
    main()
