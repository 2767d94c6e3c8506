"""Sharded models: what is refused by name, what fails on all ranks, and ranks that are killed."""

import os
import pickle
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import dtme
from benchmarks.stacks.processes import (
    TASKS,
    WIDTH,
    Transformer,
    blocks_of,
    input_of,
    loss_of,
    model_of,
    plan_of,
    timm_vit,
    whole,
)
from benchmarks.stacks.ranks import run_ranks
from benchmarks.stacks.sharded import every_block

LOSSES = dict.fromkeys(TASKS, F.mse_loss)


def batch_of(number):
    generator = torch.Generator().manual_seed(number)
    targets = {task: torch.randn(3, 5, 2, generator=generator, dtype=torch.float64) for task in TASKS}
    return input_of(Transformer, number), targets


def refused(function, kind, *says):
    with pytest.raises(kind) as caught:
        function()
    for text in says:
        assert re.search(text, str(caught.value)), (text, str(caught.value))


def state_of(model):
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def same_state(model, before):
    return all(torch.equal(value, before[name]) for name, value in state_of(model).items())


# --- what is refused --------------------------------------------------------------------------------------------------


def refusals(rank, folder):
    model, x = model_of(), input_of(Transformer, rank)
    report = dtme.analyze(model_of(is_expanded=False), [batch_of(rank)], LOSSES, progress=False)
    every_block(model)
    before = state_of(model)
    advice = "loaded into a plain model, replanned there and sharded again"
    refused(lambda: dtme.replan(model, plan_of(model)), RuntimeError, "FSDPModule", advice)
    refused(lambda: dtme.expand(model, plan_of(model)), RuntimeError, "FSDPModule")
    refused(lambda: dtme.collapse(model), RuntimeError, "FSDPModule", "before that")
    refused(lambda: dtme.conflict_map(model, batch_of(0), LOSSES, report, "blocks.0"), RuntimeError, "plain model")
    refused(lambda: dtme.ConflictMonitor(model, LOSSES), RuntimeError, "between epochs")
    refused(lambda: dtme.collapse(nn.parallel.DistributedDataParallel(model_of())), RuntimeError, "DistributedData")
    not_averaged(rank, x)
    different_tasks(rank, model, x)
    different_rows(rank, model, x)
    copies(model, x)
    saves(rank, model, f"{folder}/model")
    loads(f"{folder}/model")
    assert same_state(model, before)
    tensor_parallel(f"{folder}/parallel")
    loops(rank)


def not_averaged(rank, x):
    """Plain DDP waits for the gradients of all parameters, which the backward pass says, not the next forward."""
    says = ("has not averaged the gradients", "find_unused_parameters=True")
    for tasks, labels in ((("depth", "normals")[rank], None), (None, TASKS[:2])):
        wrapped = nn.parallel.DistributedDataParallel(model_of())
        found = wrapped(x, tasks)
        loss = loss_of(found if labels is None else {task: found[task] for task in labels})
        refused(loss.backward, RuntimeError, *says)
    wrapped = nn.parallel.DistributedDataParallel(model_of())
    sum(loss_of(wrapped(x, task)) for task in TASKS).backward()  # one pass through several forwards is averaged
    with wrapped.no_sync():
        loss_of(wrapped(x, "depth")).backward()


def different_tasks(rank, model, x):
    tasks = ("depth", "normals")[rank]
    says = (r"rank 0 \['depth'\], rank 1 \['normals'\]", "must run the same tasks", "labels")
    refused(lambda: model(x, tasks), RuntimeError, *says)
    plain = model_of(is_expanded=False)
    fully_shard(plain)
    refused(lambda: plain(x, tasks), RuntimeError, *says)
    backbone = model_of().backbone
    every = blocks_of(dtme.MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS}))
    for block in every.values():
        fully_shard(block)
    fully_shard(backbone)

    def chosen():
        with dtme.tasks(backbone, tasks):
            backbone(x)

    refused(chosen, RuntimeError, *says)

    class FullyShardedDataParallel(nn.Sequential):  # the earlier one needs a GPU
        pass

    wrapped = model_of()
    wrapped.heads["depth"] = FullyShardedDataParallel(wrapped.heads["depth"])
    refused(lambda: wrapped(x), RuntimeError, "fully_shard")
    loss_of(model(x)).backward()  # nobody waits for anything
    model.zero_grad()


def different_rows(rank, model, x):
    """A rank without rows says so, and one in evaluation mode compares as often as the others."""
    tasks = [TASKS[i % 2] for i in range(len(x))]
    some, rows = ((x[:0], []), (x, tasks))[rank]
    refused(lambda: model(some, task_of_row=rows), RuntimeError, r"rank 0 \[\], rank 1 \[", "same tasks")
    model.train(rank == 0)
    loss_of(model(x, task_of_row=tasks)).backward()
    loss_of(model(x[:2])).backward()
    model.train().zero_grad()


def seen(module, args, output):
    module.times = getattr(module, "times", 0) + 1


def copies(model, x):
    """What is exported has nothing of FSDP2 any more, but hooks of others."""
    handle = model.backbone.register_forward_hook(seen)
    single = pickle.loads(pickle.dumps(model.export_task("depth")))
    handle.remove()
    assert not any("FSDP" in type(module).__name__ for module in single.modules())
    torch.testing.assert_close(single(x), model_of()(x, "depth")["depth"], rtol=1e-12, atol=1e-12)
    assert single.backbone.times == 1 and len(single.state_dict())
    loss_of(model(x)).backward()
    assert not hasattr(model.backbone, "times") and all(p.grad is None for p in single.parameters())
    model.zero_grad()


def saves(rank, model, folder):
    nowhere = "/dev/null/model" if rank == 0 else folder  # the first rank alone writes, and fails
    says = "save_pretrained ended on all ranks because of rank 0" if rank else ""
    refused(lambda: model.save_pretrained(nowhere), OSError if rank == 0 else RuntimeError, says)
    model.save_pretrained(folder if rank == 0 else "/dev/null/model")


def loads(folder):
    """Neither an expanded model nor a plain one is loaded into a backbone that is sharded already."""
    own = f"{folder}-{dist.get_rank()}"
    model_of(is_expanded=False).save_pretrained(own)
    heads, backbone = {task: nn.Linear(WIDTH, 2).double() for task in TASKS}, Transformer().double()
    fully_shard(backbone)
    load, says = dtme.MultiTaskModel.from_pretrained, "plain one on every rank, then call fully_shard"
    refused(lambda: load(folder, backbone, heads), RuntimeError, says)
    refused(lambda: load(own, backbone, heads), RuntimeError, says)
    assert not dtme.is_expanded(backbone)


def parallelized(model):
    styles = {"attn.q": ColwiseParallel(), "attn.k": ColwiseParallel(), "attn.v": ColwiseParallel()}
    for block in blocks_of(model).values():
        parallelize_module(block, init_device_mesh("cpu", (2,)), {**styles, "attn.out": RowwiseParallel()})
    return model


def tensor_parallel(folder):
    plain = parallelized(model_of(is_expanded=False))
    refused(lambda: dtme.expand(plain, plan_of(plain)), RuntimeError, "parallelize_module", "before")
    assert not dtme.is_expanded(plain)
    model = parallelized(model_of())
    refused(lambda: dtme.replan(model, plan_of(model)), RuntimeError, "parallelize_module")
    for call in (
        lambda: dtme.analyze(model, [batch_of(0)], LOSSES, progress=False),
        lambda: model.export_task("depth"),
        lambda: dtme.verify(model, input_of(Transformer, 0)),
    ):
        refused(call, RuntimeError, "tensor parallel", "before parallelize_module")
    for block in blocks_of(sequences := model_of()).values():
        parallelize_module(block, init_device_mesh("cpu", (2,)), {"norm1": SequenceParallel()})
    refused(lambda: sequences(input_of(Transformer, 0)), RuntimeError, "block 'blocks.0' is sequence parallel")
    model.save_pretrained(folder)
    heads = {task: nn.Linear(WIDTH, 2).double() for task in TASKS}
    loaded = dtme.MultiTaskModel.from_pretrained(folder, Transformer().double(), heads)
    assert same_state(loaded, dict(model_of().state_dict()))


def loops(rank):
    """Loops that call the backbone's own methods, or extract and predict, learn as the model does."""
    want, x = model_of(timm_vit), [input_of(timm_vit, i) for i in range(2)]
    for i in range(2):
        (loss_of(want(x[i])) / 2).backward()

    def own(model):
        with dtme.tasks(model.backbone, TASKS):
            found = dtme.split(model.backbone.forward_features(x[rank]), TASKS)
        return {task: head(found[task]) for task, head in model.heads.items()}

    for predict in (own, lambda model: model.predict(model.extract(x[rank], TASKS), TASKS)):
        model = model_of(timm_vit)
        if predict is own:
            fully_shard(model.backbone)
        else:
            every_block(model)
        with torch.no_grad():
            predict(model.eval())
        loss_of(predict(model.train())).backward()
        for (name, p), q in zip(model.backbone.named_parameters(), want.backbone.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_known_to_be_right_is_refused_by_name_on_all_ranks(tmp_path):
    run_ranks(refusals, 2, str(tmp_path))


# --- a rank that is killed --------------------------------------------------------------------------------------------


class Killed:
    """Batches, before the fifth of which this process is killed."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


class KillsWhileSaved(nn.Parameter):
    """Kills the process that copies it."""

    def detach(self):
        os.kill(os.getpid(), signal.SIGKILL)


def killed(rank, folder, what):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    torch.set_num_threads(1)
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = {name: (len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()}
    begun = time.monotonic()
    try:
        if what == "analyze":
            loader = [batch_of(i) for i in range(8)]
            dtme.analyze(model, Killed(loader) if rank else loader, LOSSES, progress=False)
        else:
            fully_shard(model)
            model.reshard()
            if rank:
                model.heads["depth"].register_buffer("last", KillsWhileSaved(torch.zeros(2)))
            else:
                model.heads["depth"].register_buffer("last", torch.zeros(2))
            model.save_pretrained(f"{folder}/model")
    except RuntimeError as error:
        untouched = what != "analyze" or (
            same_state(model, before)
            and hooks == {name: (len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()}
            and all(parameter.requires_grad for parameter in model.parameters())
        )
        said = f"{time.monotonic() - begun:.1f}\n{untouched}\n{error}"
        with open(f"{folder}/said", "w") as file:
            file.write(said)
    os._exit(0)


@pytest.mark.parametrize("what", ["analyze", "save_pretrained"])
def test_the_others_end_with_a_cause(tmp_path, what):
    context = torch.multiprocessing.spawn(killed, (str(tmp_path), what), 2, join=False)
    for process in context.processes:
        process.join(60)
    codes = [process.exitcode for process in context.processes]
    assert codes == [0, -signal.SIGKILL]
    seconds, untouched, said = (tmp_path / "said").read_text().split("\n", 2)
    assert float(seconds) < 30 and untouched == "True"
    name = "the analysis" if what == "analyze" else what
    assert said.startswith(f"{name} ended on rank 0: another rank is gone")
    assert not (tmp_path / "model").exists()
