"""One task shipped: torch.export, ONNX, AOTInductor, and processes without this package."""

import copy
import operator
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dtme
from benchmarks.models import models
from benchmarks.models.subject import Subject, features
from dtme.blocks import find_blocks
from dtme.task_model import TaskModel

from .situation import difference, situation
from .small import TASKS, WIDTH, heads, images, move, plan_of, vit

NEEDS = ("timm", "transformers", "torchvision")
TASK = TASKS[0]
ATTENTIONS = (
    *("timm/vision_transformer", "timm/swin_transformer", "timm/convit", "torch/TransformerEncoder, padding mask"),
    *("torch/TransformerDecoder", "transformers/bert", "transformers/llama", "transformers/bart"),
    *("transformers/swinv2", "transformers/segformer"),
)
"""A model for every way into an attention: copied, handed on, and caught where it is written out."""
EXPORTED = ("timm/swin_transformer_v2", "transformers/bert", "transformers/llama")


def first_output(backbone: nn.Module, x: Any) -> Tensor:
    run = getattr(backbone, "forward_features", backbone)
    return features(run(**x) if isinstance(x, Mapping) else run(x))[0]


def expanded(subject: Subject, **options: Any) -> dtme.MultiTaskModel:
    """A modulation in every block, and task tokens in all that can take them, away from the identity."""
    model = dtme.MultiTaskModel(subject.backbone, {task: nn.Identity() for task in TASKS}, first_output).eval()
    blocks = list(find_blocks(subject.backbone))
    some = list(blocks)
    while True:
        try:
            dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, dict.fromkeys(blocks, TASKS), dict.fromkeys(some, TASKS)))
            break
        except ValueError as error:  # it names a block that takes none
            some.remove(re.findall(r"block '([^']+)'", str(error))[0])
    assert some, f"{subject.name} takes no task tokens anywhere"
    move(model, ".dtme.")
    return model


def build(name: str) -> tuple[Subject, dtme.MultiTaskModel]:
    models.prepare()
    subject = models.build(name)
    return subject, expanded(subject)


def dynamic(x: Any, *axes: int) -> Any:
    sizes = dict.fromkeys(axes or (0,), torch.export.Dim.DYNAMIC)
    return {name: sizes for name in x} if isinstance(x, Mapping) else sizes


@situation("plain export", "ten models' attentions", against="model(x, tasks)", limit=1e-12, needs=NEEDS)
def eager() -> float:
    worst = 0.0
    for name in ATTENTIONS:
        subject, model = build(name)
        with torch.no_grad():
            x = subject.inputs(3)
            worst = max(worst, difference(model.export_task(TASK, plain=True)(x), model(x, TASK)[TASK]))
    return worst


def modulators() -> dtme.MultiTaskModel:
    """A batch norm by task, with statistics."""
    model = dtme.MultiTaskModel(vit(), heads())
    dtme.expand(model, plan_of(model.backbone), modulator="batch_norm")
    move(model, ".dtme.")
    with torch.no_grad():
        model.train()(2 * images(5) + 1)
    return model.eval()


def gated() -> dtme.MultiTaskModel:
    """Task tokens that take effect in part."""
    model = dtme.MultiTaskModel(vit(), heads()).eval()
    plan = plan_of(model.backbone)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, plan.modulation))
    dtme.replan(model, plan, gate_tokens=True)
    move(model, ".dtme.")
    return model


def grouped() -> dtme.MultiTaskModel:
    model = dtme.MultiTaskModel(vit(), heads(), decoder=dict).eval()
    blocks = list(find_blocks(model.backbone))
    plan = dtme.ExpansionPlan(TASKS, 2, {blocks[0]: TASKS}, {blocks[1]: TASKS}, groups={"all": TASKS})
    dtme.expand(model, plan)
    move(model, ".dtme.")
    return model


@situation("plain export", "batch norm, gates, groups, a decoder", against="model(x, tasks)", limit=1e-12, needs=NEEDS)
def kinds() -> float:
    worst = 0.0
    for make in (modulators, gated, grouped):
        model, x = make(), images()
        want = model(x)
        singles = {task: model.export_task(task, plain=True) for task in TASKS}
        worst = max(worst, *(difference(singles[task](x), want[task]) for task in TASKS))
    return worst


FRESH = """
import sys, torch
for name in sys.argv[2:]:
    program, inputs = torch.export.load(f"{name}.pt2").module(), torch.load(f"{name}.inputs.pt")
    torch.save([program(*args, **kwargs) for args, kwargs in inputs], f"{name}.out.pt")
assert not any(name.split(".")[0] in ("dtme", "dtme_kernels") for name in sys.modules)
sys.path[:0] = eval(sys.argv[1])
module = torch.load("module.pt", weights_only=False)
torch.save(module(torch.load("x.pt")), "module.out.pt")
"""
"""In a process that cannot import this package at first, and then can."""


def of_torch() -> tuple[dtme.MultiTaskModel, Tensor]:
    """What a fresh process has without importing another library."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 48, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = dtme.MultiTaskModel(encoder, heads()).double().eval()
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {"layers.0": TASKS}, {"layers.0": TASKS, "layers.1": TASKS}))
    move(model, ".dtme.")
    return model, torch.randn(2, 5, WIDTH).double()


def program_of(single: TaskModel, x: Any) -> Any:
    """With a batch of any size; of torch's own operators alone. By name where the inputs have names."""
    program: Any
    if isinstance(x, Mapping) and "x" not in x:
        program = torch.export.export(single, (), dict(x), dynamic_shapes=dynamic(x))
    else:
        program = torch.export.export(single, (x,), dynamic_shapes=(dynamic(x),))
    called = {node.target for node in program.graph.nodes if node.op == "call_function"} - {operator.getitem}
    if others := [str(one) for one in called if "dtme" in str(one)]:
        raise RuntimeError(f"the exported program calls {others}")
    return program


@situation(
    "plain export", "torch.export, any batch, run where this package is not; a pickle where it is",
    against="model(x, tasks)", limit=1e-12, needs=NEEDS,
)  # fmt: skip
def programs() -> float:
    wanted: dict[str, list[Tensor]] = {}
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place)
        for i, name in enumerate(EXPORTED):
            subject, model = build(name)
            inputs = [subject.inputs(rows) for rows in (1, 3, 6)]
            torch.export.save(program_of(model.export_task(TASK, plain=True), inputs[1]), folder / f"{i}.pt2")
            calls = [((), x) if isinstance(x, Mapping) and "x" not in x else ((x,), {}) for x in inputs]
            torch.save(calls, folder / f"{i}.inputs.pt")
            wanted[str(i)] = [model(x, TASK)[TASK] for x in inputs]
        model, x = of_torch()
        torch.save(model.export_task(TASK, plain=True), folder / "module.pt"), torch.save(x, folder / "x.pt")
        paths = repr([str(Path(path or ".").resolve()) for path in sys.path])
        command = [sys.executable, "-W", "ignore", "-c", FRESH, paths, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found = {name: torch.load(folder / f"{name}.out.pt") for name in wanted}
        pickled = difference(torch.load(folder / "module.out.pt"), model(x, TASK)[TASK])
    return max(pickled, *(difference(a, b) for name in wanted for a, b in zip(found[name], wanted[name], strict=True)))


def text(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    lengths = length - torch.arange(rows) % 3
    ids = torch.randint(1, 40, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def small_bert() -> dtme.MultiTaskModel:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24}
    bert = BertModel(BertConfig(**size, vocab_size=40, max_position_embeddings=16), add_pooling_layer=False)
    move(bert, "", scale=0.2)
    model = dtme.MultiTaskModel(bert, heads(torch.float32)).eval()
    first, second = find_blocks(bert)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {first: TASKS}, {first: TASKS, second: TASKS}))
    move(model, ".dtme.")
    return model


@situation(
    "plain export", "ONNX of BERT by input names; onnxruntime at other batches and lengths", against="model(x, tasks)",
    limit=1e-5, needs=("transformers", "onnxscript", "onnxruntime"),
)  # fmt: skip
def onnx() -> float:
    import onnxruntime

    model, x = small_bert(), text(3, 7)
    single = model.export_task(TASK, plain=True)
    shapes = dynamic(x, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/task.onnx"
        torch.onnx.export(single, (), file, kwargs=x, dynamic_shapes=shapes, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file)
    worst = 0.0
    for rows, length in ((3, 7), (1, 7), (5, 4), (8, 11)):
        x = text(rows, length)
        (found,) = session.run(None, {name: value.numpy() for name, value in x.items()})
        worst = max(worst, difference(torch.from_numpy(found), model(x, TASK)[TASK]))
    return worst


@situation("plain export", "eight threads share two modules", against="one thread", limit=1e-12, needs=NEEDS)
def threads() -> float:
    calls: list[tuple[Callable[..., Tensor], Any, Tensor]] = []
    for name in ("timm/vision_transformer", "timm/convit"):
        subject, model = build(name)
        single = model.export_task(TASK, plain=True)
        for rows in (1, 2, 3, 4):
            x = subject.inputs(rows)
            calls.append((single, x, model(x, TASK)[TASK].detach()))
    found: list[float] = []

    def work(start: int) -> None:
        for i in range(start, start + 2 * len(calls)):
            call, x, want = calls[i % len(calls)]
            found.append(difference(call(x), want))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(found) if len(found) == 16 * len(calls) else float("inf")


@situation(
    "plain export", "fine-tuned, copied, pickled, strictly exported", against="this package's operators",
    limit=1e-12, needs=NEEDS,
)  # fmt: skip
def trained() -> float:
    model, x = gated(), images()
    single = model.export_task(TASK, plain=True)
    fast = model.export_task(TASK)
    for one in (single, fast):
        one.train()
        torch.nn.functional.mse_loss(one(x), torch.ones_like(one(x))).backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        one.eval()
    copies = [single, copy.deepcopy(single), pickle.loads(pickle.dumps(single))]
    copies.append(torch.export.export(single, (x,), strict=True).module())
    moved = difference(single(x), model(x, TASK)[TASK])
    return max(difference(one(x), fast(x)) for one in copies) if moved > 1e-3 else float("inf")


@situation("plain export", "AOTInductor, other batches", against="model(x, tasks)", limit=1e-5, needs=("timm",))
def ahead_of_time() -> float:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 1}
    backbone = VisionTransformer(**size, num_classes=0)
    model = dtme.MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS}).eval()
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {"blocks.0": TASKS}, {"blocks.0": TASKS}))
    move(model, ".dtme.")
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        single = model.export_task(TASK, plain=True)
        program = torch.export.export(single, (images(3, torch.float32),), dynamic_shapes=shapes)
        options = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/task.pt2", inductor_configs=options
        )
        compiled = torch._inductor.aoti_load_package(file)
        inputs = [images(rows, torch.float32) for rows in (2, 5)]
        return max(difference(compiled(x), model(x, TASK)[TASK]) for x in inputs)
