"""What every speed report shares: shapes, options, and the fixture that races and reports."""

import ctypes
import platform
import re
from functools import partial
from typing import NamedTuple

import pytest
import torch

from . import lines
from .device import DEVICE, LOST_DEVICE, ON_GPU, RECORDING, facts
from .race import Replay, Result, Rival, device_is_lost, race, run_once
from .sweep import candidates

if DEVICE.type == "cpu" and platform.libc_ver()[0] == "glibc":
    # freed memory stays with the process, as in the midst of a training run: else what is timed is the kernel clearing
    # pages for whoever allocates
    _TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
    for _option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(_option, 2**31 - 1)


class Shape(NamedTuple):
    """One backbone's block: B images of N tokens with p channels in H heads; K tasks, t task tokens, D blocks."""

    images: int
    tokens: int
    channels: int
    heads: int
    tasks: int = 4
    task_tokens: int = 6
    blocks: int = 12


WIDTHS = {"ViT-T": (192, 3, 12), "ViT-S": (384, 6, 12), "ViT-B": (768, 12, 12), "ViT-L": (1024, 16, 24)}
if ON_GPU:
    SIZES = {"224 px": (64, 197), "448x576 px": (6, 1008), "512 px": (6, 1024)}
    SHAPES = {
        f"{model}, {size}": Shape(images, tokens, p, heads, tasks=5, blocks=blocks)
        for model, (p, heads, blocks) in WIDTHS.items()
        for size, (images, tokens) in SIZES.items()
    }
else:
    SHAPES = {
        "ViT-T, 224 px": Shape(8, 197, 192, 3),
        "ViT-S, 224 px": Shape(4, 197, 384, 6),
        "ViT-B, 224 px": Shape(2, 197, 768, 12),
        "ViT-T, 512 px": Shape(2, 1024, 192, 3),
    }
_races: dict[str, dict[str, Result]] = {}  # a race is run once, and shown by a test a rival


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("speed reports")
    group.addoption("--resume", action="store_true", help="leave out what the file DTME_LINES holds")
    group.addoption("--shapes", default="", help="only the shapes that this regular expression matches")
    group.addoption("--rivals", default="", help="only the rivals that this regular expression matches")
    group.addoption("--once", action="store_true", help="run every rival twice and time nothing: for a profiler")
    group.addoption("--sweep", action="store_true", help="race ours against itself with other tiles")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every rival of a report is a test of its own, in one race: ``RIVALS`` names them, ours last."""
    options = metafunc.config.option
    if "rival" in metafunc.fixturenames:
        names = metafunc.module.RIVALS
        if options.sweep:
            names = ["ours", *candidates(metafunc.function.__name__.removeprefix("test_"))]
        metafunc.parametrize("rival", [name for name in names if re.search(options.rivals, name)])
    if "shape" in metafunc.fixturenames:
        shapes = getattr(metafunc.module, "SHAPES", SHAPES) | getattr(metafunc.module, "MORE_SHAPES", {})
        shapes = {name: shape for name, shape in shapes.items() if re.search(options.shapes, name)}
        metafunc.parametrize("shape", shapes.values(), ids=shapes.keys())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is held already, candidates of a sweep that another group has, and what cannot be recorded."""
    path = lines.file()
    held = lines.held(path, facts()["device"]) if path and config.option.resume else set()

    def wanted(item: pytest.Item) -> bool:
        rival, group = _rival(item), _group(item)
        if rival is None:
            return False  # no shape or no rival was asked for
        if RECORDING and not re.match("ours(?!, compiled)", rival):
            return False
        sweep = candidates(group.partition(",")[0]).get(rival)
        return (group, rival) not in held and (sweep is None or re.search(sweep.group, group))

    chosen = [item for item in items if not hasattr(item, "callspec") or wanted(item)]
    # what is left of a group is raced against ours again: times of two races are not compared
    left = {_group(item) for item in chosen if hasattr(item, "callspec")}
    chosen = [item for item in items if item in chosen or (_rival(item) == "ours" and _group(item) in left)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _rival(item: pytest.Item) -> str | None:
    rival = item.callspec.params.get("rival") if hasattr(item, "callspec") else None
    return rival if isinstance(rival, str) else None


def _group(item: pytest.Item) -> str:
    """The report that a test belongs to: ``"attention, ViT-B, 512 px, forward"``."""
    name, rest = item.originalname.removeprefix("test_"), item.callspec.id
    rest = rest.replace(_rival(item) or "", "").strip("-")
    return f"{name}, {rest}".replace("--", ", ").replace("px-", "px, ")


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)
    return DEVICE


@pytest.fixture
def report(benchmark, request, rival):
    """``report(make_rivals, moved=bytes, operations=flops)``: race, and show this rival's times.

    ``make_rivals`` returns every rival by its name; it is called once a race, which has those rivals in it whose tests
    were chosen. Each is built, checked and run in its own try: one that fails fails its own test.
    """
    group = _group(request.node)
    benchmark.group = group

    def run(make_rivals, *, moved: int, operations: int, host: bool = False) -> None:
        def tell(name: str, result: Result, final: bool) -> None:
            figures = {"error": result.error} if result.error else _figures(result, moved, operations)
            kind = "recorded" if RECORDING else "once" if once else "race"
            lines.write(kind, group=group, rival=name, final=final, facts=facts(), **figures)

        once = RECORDING or request.config.option.once
        if group not in _races:
            chosen = {_rival(x) for x in request.session.items if _rival(x) and _group(x) == group}
            try:
                rivals = _with_candidates(make_rivals(), chosen)
            except Exception as error:  # everybody's
                rivals = {name: Rival(partial(_fail, error)) for name in chosen}
            if once:
                _races[group] = run_once(rivals, DEVICE, tell)
            else:
                _races[group] = race(rivals, DEVICE, host=host, report=tell if lines.file() else None)
            if device_is_lost(DEVICE):
                pytest.exit("the device is lost", returncode=LOST_DEVICE)
        if rival not in _races[group]:
            pytest.skip(f"{rival} does not run on {DEVICE.type}")
        result = _races[group][rival]
        if result.error and not (RECORDING and result.error.startswith("ValueError")):  # nobody computed what it saw
            pytest.fail(f"{rival}: {result.error}", pytrace=False)
        if not once:
            _show(benchmark, result, _figures(result, moved, operations)["extra"])

    return run


def _fail(error: Exception) -> None:
    raise error


def _with_candidates(rivals: dict[str, Rival], chosen: set[str]) -> dict[str, Rival]:
    """Those that were chosen, ours first, so that a run that is cut off has it. A candidate is ours, patched."""
    every = dict(rivals)
    for name in chosen - every.keys():
        for sweep in candidates(name=name).values():
            every[name] = Rival(sweep.patched(name, rivals["ours"].run), sweep.patched(name, rivals["ours"].check))
    return {name: every[name] for name in sorted(every, key=lambda name: name != "ours") if name in chosen}


def _figures(result: Result, moved: int, operations: int) -> dict[str, dict[str, object]]:
    times = torch.tensor(result.seconds, dtype=torch.float64)
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {
        "stats": {"median": median, "p20": low, "p80": high, "rounds": len(times)},
        "extra": {
            "GB/s": moved / median / 1e9,
            "TFLOP/s": operations / median / 1e12,
            "peak MB": None if result.peak_bytes is None else result.peak_bytes / 1e6,
            "repeats": result.repeats,
        },
    }


def _show(benchmark, result: Result, extra: dict[str, object]) -> None:
    """As if pytest-benchmark had measured it."""
    benchmark._timer = Replay(result.seconds)
    benchmark.pedantic(lambda: None, rounds=len(result.seconds))
    median = float(torch.tensor(result.seconds, dtype=torch.float64).quantile(0.5))
    assert abs(benchmark.stats.stats.median - median) <= 0.5 * median, "pytest-benchmark did not read the replay"
    benchmark.extra_info |= facts() | extra


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """What a figure depends on, and nothing else about somebody's machine."""
    cpu = machine_info["cpu"]
    facts = {"cpu": cpu.get("brand_raw", "unknown"), "cores": cpu.get("count"), "python": platform.python_version()}
    machine_info.clear()
    machine_info |= facts


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Percentiles instead of every single time."""
    for record in output_json["benchmarks"]:
        del record["options"]  # of a clock that pytest-benchmark did not run
        times = torch.tensor(record["stats"].pop("data"), dtype=torch.float64)
        low, high = times.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        record["stats"] |= {"p20": low, "p80": high}
