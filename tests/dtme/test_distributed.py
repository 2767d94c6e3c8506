"""Two processes with a shard each report what one process does with all of the data; DDP trains what is expanded."""

import os
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dtme
from tests.dtme.clients import WIDTH, OwnTransformer

LOSSES = {"a": F.mse_loss, "b": F.l1_loss}
WORLD = 2


def make_model():
    torch.manual_seed(0)
    return dtme.MultiTaskModel(OwnTransformer(), {task: nn.Linear(WIDTH, 2) for task in LOSSES}).double()


def make_data():
    """Thirteen samples, one a batch: an odd number, so that the shards are uneven."""
    generator = torch.Generator().manual_seed(1)
    shape = {"x": (13, 1, 5, WIDTH), "a": (13, 1, 5, 2), "b": (13, 1, 5, 2)}
    data = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in shape.items()}
    return [(data["x"][i], {"a": data["a"][i], "b": data["b"][i]}) for i in range(13)]


def in_pairs(data):
    """Six batches of two samples."""
    joined = zip(data[:-1:2], data[1::2], strict=True)
    return [(torch.cat([x, z]), {t: torch.cat([y[t], u[t]]) for t in LOSSES}) for (x, y), (z, u) in joined]


def turned(losses, rank):
    """On odd ranks the tasks are named the other way round."""
    return dict(reversed(losses.items())) if rank % 2 else losses


def worker(rank, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        model, data = make_model(), make_data()
        report = dtme.analyze(model, data[rank::WORLD], LOSSES, progress=False)
        report.save(f"{folder}/report{rank}.json")
        pairs = dtme.analyze(model, in_pairs(data)[rank::WORLD], turned(LOSSES, rank), progress=False)
        pairs.save(f"{folder}/pairs{rank}.json")
        torch.manual_seed(0)
        dtme.expand(model, report.plan(num_tokens=2))
        wrapped = nn.parallel.DistributedDataParallel(model)
        x, targets = data[rank]
        sum(LOSSES[task](out, targets[task]) for task, out in wrapped(x).items()).backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/grads{rank}.pt")
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            dtme.expand(nn.parallel.DistributedDataParallel(make_model()), report.plan())
    finally:
        dist.destroy_process_group()


def test_all_ranks_report_what_one_process_does_and_ddp_averages_gradients(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), WORLD)
    model, data = make_model(), make_data()
    want = dtme.analyze(model, data, LOSSES, progress=False)
    reports = [dtme.ConflictReport.load(tmp_path / f"report{rank}.json") for rank in range(WORLD)]
    assert Path(tmp_path / "report0.json").read_text() == Path(tmp_path / "report1.json").read_text()
    for name in ("ranks", "range_counts", "null_counts", "valid_counts"):
        assert torch.equal(getattr(reports[0], name), getattr(want, name))
    assert reports[0].num_samples == 13 and reports[0].head_losses is None
    alone = dtme.analyze(model, in_pairs(data), LOSSES, progress=False).head_losses
    for rank in range(WORLD):
        pairs = dtme.ConflictReport.load(tmp_path / f"pairs{rank}.json")
        assert pairs.tasks == tuple(LOSSES)
        torch.testing.assert_close(pairs.head_losses, torch.cat([alone[::2], alone[1::2]]), rtol=1e-9, atol=0)
    torch.testing.assert_close(reports[0].eigenvalues, want.eigenvalues, rtol=1e-12, atol=1e-12)

    torch.manual_seed(0)
    dtme.expand(model, want.plan(num_tokens=2))
    for x, targets in data[:WORLD]:
        (sum(LOSSES[task](out, targets[task]) for task, out in model(x).items()) / WORLD).backward()
    grads = torch.load(tmp_path / "grads0.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-12)


# --- what stops one rank stops all ------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def broken(prediction, target):
    raise Broken("of this rank")


def scenarios(rank):
    """name -> (loader, losses, options, what the error of this rank says; None where there is none)."""
    data = make_data()
    mine, other = data[rank::WORLD], {"b": F.l1_loss, "a": F.mse_loss}
    third = {"a": F.mse_loss, "c": F.l1_loss}
    first = rank == 0
    return {
        "another order": (mine, LOSSES if first else other, {}, None),
        "other tasks": (mine, LOSSES if first else third, {}, "unknown task 'c'" if rank else "rank 1: .*'c'"),
        "an empty rank": (mine if first else [], LOSSES, {}, "rank 1: .*no batch" if first else "no batch"),
        "raises": (mine, LOSSES | ({} if first else {"b": broken}), {}, "rank 1: Broken" if first else "of this rank"),
        "settle in one": (mine, LOSSES, {"settle": 0.9 if first else None}, "settle must be the same on all ranks"),
        "empty, settles": (
            mine if first else [],
            LOSSES,
            {"settle": 0.9},
            "rank 1: .*no batch" if first else "no batch",
        ),
        "other ratios": (mine, LOSSES, {"ratio": 9.0 if first else (9.0, 2.0)}, "ratios must be the same on all ranks"),
        "bad argument": (mine, LOSSES, {"ratio": 1.0 if first else -1.0}, "rank 1: .*ratio" if first else "ratio must"),
        "settles": (mine, LOSSES, {"settle": 0.6}, None),
        "other blocks": (mine, LOSSES, {"blocks": ["layers.0"] if first else None}, "must be the same on all ranks"),
    }


def failing_worker(rank, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(minutes=2)
    )
    found = {}
    try:
        for name, (loader, losses, options, says) in scenarios(rank).items():
            options |= {"folder": f"{folder}/{name}"} if name == "settles" else {}
            try:
                report = dtme.analyze(make_model(), loader, losses, progress=False, **options)
                found[name] = [report.tasks, report.range_counts.tolist(), report.settled, report.num_batches]
                assert says is None, name
            except (RuntimeError, ValueError, Broken) as error:
                assert says is not None and re.search(says, str(error)), (name, error)
                found[name] = "error"
        torch.save(found, f"{folder}/found{rank}.pt")
        dist.barrier()  # neither leaves while the other still reads from it
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads have been seen to abort the end of an interpreter, which is not what is tried here


def test_what_stops_one_rank_stops_all_and_tasks_may_come_in_any_order(tmp_path):
    torch.multiprocessing.spawn(failing_worker, (str(tmp_path),), WORLD)
    first, second = (torch.load(tmp_path / f"found{rank}.pt") for rank in range(WORLD))
    assert first == second and len(first) == len(scenarios(0))
    want = dtme.analyze(make_model(), make_data(), LOSSES, progress=False)
    assert first["another order"] == [want.tasks, want.range_counts.tolist(), None, 13]
    assert [name for name, value in first.items() if value != "error"] == ["another order", "settles"]
    assert len(list((tmp_path / "settles").iterdir())) == 2 * WORLD
