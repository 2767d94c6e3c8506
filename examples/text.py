"""Three tasks on sentences of different lengths, with a small BERT, through all of dtme: ``python examples/text.py``.

Every word gets its class and whether it stands for the second time; the sentence gets its sentiment, from its first
token. Sentences are padded: BERT's ``attention_mask`` says which tokens count, in the analysis and in the maps too.
The first plan is made once the heads have learnt a little, a second one in the middle of the training. Everything is
drawn and saved into a folder that is thrown away at the end, or into the one that is named: ``python examples/text.py
out``.
"""

import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import dtme

CLASSES = {
    "pad": ["[PAD]"],
    "mark": ["[CLS]", "[SEP]", ",", "and", "but"],
    "article": ["the", "a", "this", "every"],
    "noun": ["film", "ending", "actor", "song", "story", "scene", "plot", "hero"],
    "good": ["lovely", "bright", "clever", "warm"],
    "bad": ["dull", "slow", "empty", "loud"],
    "verb": ["is", "seems", "feels", "looks"],
    "not": ["not", "never"],
}
WORDS = [word for words in CLASSES.values() for word in words]
CLASS_OF = {word: i for i, words in enumerate(CLASSES.values()) for word in words}
TASKS = ("word_class", "repeated", "sentiment")
IGNORED = -100


def sentence(rng: random.Random) -> tuple[list[str], int]:
    """Words, and the sentiment: 1 if the good adjectives, or the bad ones with a "not", are more than the others."""
    words, score = ["[CLS]"], 0
    for clause in range(rng.randint(1, 4)):
        words += [rng.choice([",", "and", "but"])] if clause else []
        words += [rng.choice(CLASSES["article"]), rng.choice(CLASSES["noun"]), rng.choice(CLASSES["verb"])]
        kind, negated = rng.choice(["good", "bad"]), rng.random() < 0.3
        words += [*([rng.choice(CLASSES["not"])] if negated else []), rng.choice(CLASSES[kind])]
        score += 1 if (kind == "good") != negated else -1
    return [*words, "[SEP]"], int(score > 0)


def collate(sentences: list[tuple[list[str], int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What BERT takes, padded to the longest sentence, and a target for every task."""
    length = max(len(words) for words, _ in sentences)
    padded = [[*words, *["[PAD]"] * (length - len(words))] for words, _ in sentences]
    ids = torch.tensor([[WORDS.index(word) for word in words] for words in padded])
    mask = (ids != 0).long()
    classes = torch.tensor([[CLASS_OF[word] for word in words] for words in padded])
    again = torch.tensor([[word in words[:i] for i, word in enumerate(words)] for words in padded]).long()
    targets = {"word_class": classes, "repeated": again}
    targets = {task: target.masked_fill(mask == 0, IGNORED) for task, target in targets.items()}
    x = {"input_ids": ids, "attention_mask": mask}
    return x, {**targets, "sentiment": torch.tensor([label for _, label in sentences])}


class FirstToken(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens[:, 0])


def per_token(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction.flatten(0, 1), target.flatten(), ignore_index=IGNORED)


LOSSES = {"word_class": per_token, "repeated": per_token, "sentiment": F.cross_entropy}


def parts() -> dict[str, Any]:
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    heads = {"word_class": nn.Linear(48, len(CLASSES)), "repeated": nn.Linear(48, 2), "sentiment": FirstToken(48, 2)}
    return {"backbone": BertModel(config, add_pooling_layer=False), "heads": heads}


def train(model: nn.Module, optimizer: Any, loader: list[Any], monitor: dtme.ConflictMonitor | None = None) -> float:
    """One pass; the mean loss."""
    total = 0.0
    for x, targets in loader:
        optimizer.zero_grad()
        predictions = model.train()(x)
        loss = torch.stack([LOSSES[task](predictions[task], targets[task]) for task in TASKS]).sum()
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step((x, targets))
        total += loss.item() / len(loader)
    return total


def accuracy(model: nn.Module, loader: list[Any]) -> dict[str, float]:
    right = {task: torch.zeros(2) for task in TASKS}
    with torch.no_grad():
        for x, targets in loader:
            for task, prediction in model.eval()(x).items():
                known = targets[task] != IGNORED
                hits = prediction.argmax(-1)[known] == targets[task][known]
                right[task] += torch.tensor([hits.sum(), hits.numel()])
    return {task: float(hits / count) for task, (hits, count) in right.items()}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    loader = [collate([sentence(rng) for _ in range(16)]) for _ in range(16)]
    held_out = [collate([sentence(rng) for _ in range(64)])]
    model = dtme.MultiTaskModel(**parts())

    # heads first: what untrained ones say of conflicts is one random draw
    train(model, torch.optim.Adam(model.parameter_groups(lr=2e-3)), loader)

    # padded tokens do not count: the input is a mapping with an attention_mask
    report = dtme.analyze(model, loader, LOSSES, progress=False)
    print(report)
    report.plot(folder / "conflicts.png")
    dtme.expand(model, report.plan(num_tokens=2))
    model.print_trainable_parameters()
    print(f"all tasks at once and each alone: {dtme.verify(model, loader[0][0]):.1e} apart")

    optimizer = torch.optim.Adam(model.parameter_groups(lr=2e-3))
    monitor = dtme.ConflictMonitor(model, LOSSES, every=16)
    for half in range(2):
        for _ in range(2):
            loss = train(model, optimizer, loader, monitor)
        print(f"loss {loss:.3f}, held-out accuracy", {t: f"{v:.0%}" for t, v in accuracy(model, held_out).items()})
        if half == 0:  # the tasks may fight elsewhere by now: go on with the plan of another analysis
            report = dtme.analyze(model, loader, LOSSES, progress=False)
            dtme.replan(model, report.plan(num_tokens=2), optimizer, gate_tokens=True)
    print(monitor)

    x, targets = held_out[0]
    block = report.blocks[int(report.range_rates.argmax())]
    maps = dtme.conflict_map(model, (x, targets), LOSSES, report, block)
    words = [[WORDS[i] for i in ids] for ids in x["input_ids"].tolist()]
    dtme.plot_conflict_map(maps, folder / "sentence.png", tokens=words, row=0, worst=3)
    cosine, i = maps["word_class", "sentiment"][0].nan_to_num(1).min(0)
    print(f"word_class and sentiment pull apart most at {words[0][i]!r} of {block}: cosine {cosine:.2f}")

    model.save_pretrained(folder / "model")
    again = dtme.MultiTaskModel.from_pretrained(folder / "model", **parts()).eval()
    with torch.no_grad():
        mood = again(x, tasks="sentiment")["sentiment"]
        if not torch.equal(mood, model.eval()(x, tasks="sentiment")["sentiment"]):
            raise SystemExit("the reloaded model predicts something else than the one that was saved")
    print("reloaded: the same predictions")
    print(" ".join(word for word in words[0] if word != "[PAD]"), "→", ("bad", "good")[int(mood[0].argmax())])


if __name__ == "__main__":
    with TemporaryDirectory() as unnamed:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else unnamed))
