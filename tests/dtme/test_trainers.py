"""What trips people up in transformers' Trainer: columns, labels, decay, and files of another model."""

import copy

import pytest
import torch
from torch import nn

import dtme
from benchmarks.stacks import loops
from benchmarks.stacks.loops import LOSSES, TASKS
from benchmarks.stacks.trainers import accelerator, trainer

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


def batch(count=3, tasks=TASKS):
    some = loops.samples(count)
    labels = {task: torch.stack([sample["labels"][task] for sample in some]) for task in tasks}
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in some]), "labels": labels}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_only_tasks_with_labels_run_and_the_loss_is_weighted(tmp_path):
    model = loops.expanded_model()
    run = trainer(tmp_path, model)
    run.loss_weights = {"depth": 0.25}
    some = batch(tasks=("depth", "edges"))
    loss, predictions = run.compute_loss(model, some, return_outputs=True)
    want = loops.task_loss(model, some, "edges") + 0.25 * loops.task_loss(model, some, "depth")
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert list(predictions) == ["edges", "depth"]
    loss.backward()
    assert all(p.grad is None for p in model.task_parameters("normals"))


def test_logs_have_each_tasks_loss(tmp_path):
    model = loops.expanded_model(loops.vit(), dtype=torch.float32)
    run = trainer(tmp_path, model, dtype=torch.float32, logging_strategy="steps", logging_steps=2, max_steps=4)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert sum(entry[f"loss_{task}"] for task in TASKS) == pytest.approx(entry["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": None}, "no labels"),
        ({"labels": torch.zeros(3)}, "labels of type Tensor"),
        ({"labels": {}}, "labels of type dict"),
        ({"labels": {"pose": torch.zeros(3)}}, "labels of 'pose', for which there is no loss"),
    ],
)
def test_a_batch_needs_labels_by_task(tmp_path, change, says):
    model = loops.expanded_model()
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, model).compute_loss(model, batch() | change)


def test_a_loss_is_a_scalar(tmp_path):
    run = trainer(tmp_path, loops.expanded_model())
    run.losses["depth"] = lambda prediction, target: (prediction - target).square()
    with pytest.raises(ValueError, match=r"loss of 'depth' must be a scalar tensor, got one of shape \("):
        run.compute_loss(run.model, batch())


def test_samples_of_one_batch_have_the_same_tasks(tmp_path):
    run = trainer(tmp_path, loops.expanded_model())
    samples = loops.samples(3)
    del samples[1]["labels"]["depth"]
    with pytest.raises(ValueError, match=r"labels of \['edges', 'depth', 'normals'\] and of \['edges', 'normals'\]"):
        run.data_collator(samples)
    # a data set of columns has None where there is nothing
    found = run.data_collator([{**one, "labels": {**one["labels"], "depth": None}} for one in samples])
    assert list(found["labels"]) == ["edges", "normals"] and found["labels"]["edges"].shape == (3, 2)


def test_tasks_may_have_names_that_transformers_gives_a_meaning(tmp_path):
    """Its default collator renames "label", and its evaluation drops an output called "loss"."""
    from transformers import TrainingArguments

    from dtme.trainer import MultiTaskTrainer

    names = ("label", "loss", "logits")
    model = dtme.MultiTaskModel(loops.vit(), {task: nn.Linear(loops.WIDTH, 2) for task in names}, "cls").double()
    samples = [
        {"pixel_values": one["pixel_values"], "labels": dict(zip(names, one["labels"].values(), strict=True))}
        for one in loops.samples(5)
    ]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1)
    run = MultiTaskTrainer(model, arguments, losses=dict.fromkeys(names, nn.functional.mse_loss), train_dataset=samples)
    run.train()
    seen = run.predict(samples)
    assert list(seen.predictions) == list(seen.label_ids) == list(names) and seen.metrics["test_loss"] > 0


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"losses": {"pose": nn.functional.mse_loss}}, ValueError, "losses are for the unknown task 'pose'"),
        ({"losses": LOSSES, "loss_weights": {"pose": 1.0}}, ValueError, "loss_weights are for the unknown task 'pose'"),
        ({"losses": LOSSES, "compute_loss_func": nn.functional.mse_loss}, ValueError, "give losses={task: function}"),
        ({"losses": LOSSES, "label_smoothing": 0.1}, ValueError, "smooth in the losses"),
        ({"losses": LOSSES, "model": nn.Linear(2, 2)}, TypeError, "trains a MultiTaskModel, got Linear"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, options, error, says):
    from transformers import TrainingArguments

    from dtme.trainer import MultiTaskTrainer

    smoothing = options.pop("label_smoothing", 0.0)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=smoothing)
    with pytest.raises(error, match=says):
        MultiTaskTrainer(**{"model": loops.expanded_model(), "args": arguments, **options})


def test_no_decay_on_what_was_added(tmp_path):
    model = loops.expanded_model()
    run = trainer(tmp_path, model)
    decayed, others = run.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_decayed, of_others = ({names[id(p)] for p in group["params"]} for group in (decayed, others))
    assert decayed["weight_decay"] == loops.DECAY and others["weight_decay"] == 0.0
    assert {name for name in names.values() if ".dtme." in name} < of_others
    assert "backbone.layers.0.mlp.fc1.weight" in of_decayed and "heads.depth.weight" in of_decayed
    assert len(of_decayed | of_others) == len(names) == len(of_decayed) + len(of_others)


def test_columns_that_the_backbone_takes_are_kept(tmp_path):
    """Trainer would keep those of ``model.forward(x, tasks, **inputs)``: none."""
    samples = [{**sample, "file": "a.png", "index": 3} for sample in loops.samples(4)]
    run = trainer(tmp_path, loops.expanded_model())
    assert set(next(iter(run.get_eval_dataloader(samples)))) == {"pixel_values", "labels"}
    # which of them a function reads is not known
    of_function = loops.expanded_model()
    of_function.features = lambda net, x: net(pixel_values=x["pixel_values"]).last_hidden_state[:, 0]
    run = trainer(tmp_path, of_function)
    found = next(iter(run.get_eval_dataloader([{**one, "file": None} for one in samples])))
    assert set(found) == {"pixel_values", "labels", "index"}


def test_a_plain_trainer_gives_the_backbone_no_counts_of_labels(tmp_path):
    """Trainer adds ``num_items_in_batch`` where a forward takes ``**inputs``, unless the model says that it is none."""
    from transformers import Trainer, TrainingArguments

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.mse_loss(outputs["depth"], labels)

    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = loops.vit()

        def forward(self, pixel_values):
            return self.vit(pixel_values).last_hidden_state

    model = dtme.MultiTaskModel(Strict(), {"depth": nn.Linear(loops.WIDTH, 2)}, "cls").double()
    samples = [{"pixel_values": s["pixel_values"], "labels": s["labels"]["depth"]} for s in loops.samples(4)]
    arguments = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    run = Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=samples, compute_loss_func=loss)
    run.train()
    # a file that lacks names, as that of tied weights does, is only warned of
    run._issue_warnings_after_load(model.load_state_dict({}, strict=False))


def test_a_tensor_input_is_named_x_and_the_model_may_come_from_a_function(tmp_path):
    from transformers import TrainingArguments

    from dtme.trainer import MultiTaskTrainer

    samples = [{"x": sample["pixel_values"], "labels": sample["labels"]} for sample in loops.samples(4)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, activation_checkpointing=True
    )
    run = MultiTaskTrainer(
        None,
        arguments,
        losses=LOSSES,
        model_init=lambda: loops.expanded_model(loops.timm_vit()),
        train_dataset=samples,
    )
    run.train()
    assert run.multi_task_model.is_activation_checkpointing and run.state.log_history[-1]["train_loss"] > 0


def test_what_accelerate_prepared_is_copied_saved_and_exported(tmp_path):
    """Its autocast replaces ``forward``."""
    x = loops.images(3, dtype=torch.float32)
    model = loops.expanded_model(dtype=torch.float32).eval()
    with accelerator(mixed_precision="bf16") as one:
        prepared = one.prepare(model)
        want, plain = prepared(x)["depth"], one.unwrap_model(prepared)
    assert want.dtype == torch.float32
    single = plain.export_task("depth")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(single(x).float(), want, rtol=0.05, atol=0.05)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.heads["depth"].weight.zero_()
        other.heads["depth"].bias.zero_()
    assert not other(x)["depth"].any() and torch.equal(prepared(x)["depth"], want)
    plain.save_pretrained(tmp_path)
    fresh = loops.plain_model(dtype=torch.float32)
    assert same_weights(plain, dtme.MultiTaskModel.from_pretrained(tmp_path, fresh.backbone, fresh.heads))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    model = loops.expanded_model()
    trainer(tmp_path, model, save_strategy="steps", save_steps=1, max_steps=1).train()
    return str(tmp_path / "checkpoint-1")


def other_plan():
    model = loops.plain_model()
    return dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {"layers.2": ("edges", "depth")}))


@pytest.mark.parametrize("make", [loops.plain_model, other_plan])
def test_another_model_is_not_resumed(tmp_path, checkpoint, make):
    """Trainer would load what fits, and go on."""
    model = make()
    before = loops.weights(model)
    with pytest.raises(RuntimeError, match="names differ"):
        trainer(tmp_path, model).train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(before[name], value) for name, value in loops.weights(model).items())


def test_the_same_names_for_other_tasks_are_another_model(tmp_path):
    of_one = dtme.ExpansionPlan(TASKS, 2, {"layers.1": ("edges", "depth")})
    of_two = dtme.ExpansionPlan(TASKS, 2, {"layers.1": TASKS}, groups={"depth": ("depth", "normals")})
    model, other = (dtme.expand(loops.plain_model(), plan) for plan in (of_one, of_two))
    assert list(model.state_dict()) == list(other.state_dict())
    trainer(tmp_path, model, save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(RuntimeError, match="its plan is another"):
        trainer(tmp_path, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("sets", [(TASKS[:1], TASKS), (TASKS, TASKS[:1])])
def test_predictions_of_other_tasks_are_not_dropped(tmp_path, sets):
    """Trainer would keep those tasks that the first batch has, or end in a KeyError; a loss alone it can average."""
    samples = loops.samples(6)
    for i, sample in enumerate(samples):
        sample["labels"] = {task: sample["labels"][task] for task in sets[i // 3]}
    run = trainer(tmp_path, loops.expanded_model(), per_device_eval_batch_size=3)
    with pytest.raises(ValueError, match=r"batches with labels of \[.*\] and of \["):
        run.predict(samples)
    assert run.evaluate(samples)["eval_loss"] > 0
    assert set(run.predict(samples[3:]).predictions) == set(sets[1])
    run.args.eval_do_concat_batches = False
    assert [set(batch) for batch in run.predict(samples).predictions] == list(map(set, sets))


def test_an_earlier_save_stays_until_the_next_is_there(tmp_path, monkeypatch):
    run = trainer(tmp_path, loops.expanded_model())
    run.save_model(str(tmp_path / "saved"))
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()

    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(dtme.MultiTaskModel, "save_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "saved" / "training_args.bin").is_file()


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    run = trainer(
        tmp_path,
        loops.expanded_model(),
        eval_dataset=loops.samples(4),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last one
        save_total_limit=1,
        **options,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert not best.endswith("checkpoint-3")
    fresh = loops.plain_model()
    assert same_weights(run.model, dtme.MultiTaskModel.from_pretrained(best, fresh.backbone, fresh.heads))
