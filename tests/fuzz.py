"""Random calls, for as long as one likes; what CI has no time for, and a test function is too slow for.

    python -m tests.fuzz public --calls 100000       # public functions, values and gradients against float64
    python -m tests.fuzz raw --calls 1000000         # operators of torch.ops.dtme with arguments that nobody would give

A public call has right arguments of any shape, dtype and layout. A raw call is one of ``samples.SAMPLES`` with one to
four mutations: it must raise an error that says something, or return what the reference does, in float64 where that
takes the same arguments. ``--seed`` repeats a run; a call that fails is printed with its own seed, which
``--only SEED`` runs alone. ``tests.csrc.watched`` runs both under the sanitizers.
"""

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

import dtme_kernels as dk
from dtme_kernels.registry import OPERATORS, Operator
from dtme_kernels.testing import DTYPES, LAYOUTS, accuracy, make, orthogonal
from tests.kernels.samples import SAMPLES

REFUSED = (TypeError, ValueError, RuntimeError, MemoryError)


# the tests know the error of every dtype; here it is what is altogether wrong that is looked for
SLACK = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Wrong(Exception):
    """What a call did that it must not do."""


# --- public functions ------------------------------------------------------------------------------------------------


class Draw:
    """Random sizes and tensors of one public call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.dtype = self.random.choice(DTYPES)

    def size(self, low: int, high: int) -> int:
        """Mostly small."""
        return low + int((high - low + 1) * self.random.random() ** 2)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.seed += 1
        layout = self.random.choice(sorted(LAYOUTS)) if len(shape) > 1 and all(shape) else "contiguous"
        return make(*shape, dtype=dtype or self.dtype, layout=layout, seed=self.seed)

    def lead(self) -> tuple[int, ...]:
        return tuple(self.size(0, 6) for _ in range(self.random.randint(0, 3)))


def _token_covariance(draw: Draw) -> tuple[Any, list[Any]]:
    return dk.token_covariance, [draw.tensor(*draw.lead(), draw.size(1, 80))]


def _projected_dots(draw: Draw) -> tuple[Any, list[Any]]:
    p = draw.size(2, 60)
    rank = draw.random.randrange(1, p)
    return dk.projected_dots, [draw.tensor(draw.size(2, 6), *draw.lead(), p), draw.tensor(p, p), rank]


def _modulate(draw: Draw) -> tuple[Any, list[Any]]:
    streams, images, tokens, p = draw.size(1, 4), draw.size(0, 4), draw.size(0, 9), draw.size(1, 80)
    shared = draw.random.random() < 0.5
    x = draw.tensor(*(() if shared else (streams,)), images, tokens, p)
    parameters = draw.random.choice([draw.dtype, torch.float32])
    pairs = [draw.tensor(*shape, dtype=parameters) for shape in ((streams, p), (streams, p), (p,), (p,))]
    if draw.random.random() < 0.5:
        return dk.modulate, [x, *pairs[:2]]
    return dk.modulate_layer_norm, [x, *pairs, draw.random.choice([1e-6, 1e-3])]


def _expanded_attention(draw: Draw) -> tuple[Any, list[Any]]:
    lead = tuple(draw.size(1, 3) for _ in range(draw.random.randint(1, 2)))
    key_heads, queries, keys, t, d = (draw.size(*x) for x in ((1, 3), (1, 40), (1, 70), (0, 9), (1, 40)))
    heads, streams = key_heads * draw.size(1, 3), lead[:-1]
    shared, task = (*lead, key_heads, keys, d), (*streams, key_heads, t, d)
    args: list[Any] = [draw.tensor(*lead, heads, queries, d), *(draw.tensor(*shared) for _ in range(2))]
    args += [draw.tensor(*task) for _ in range(2)]
    full, kind = (*lead, heads, queries, keys), draw.random.choice(["none", "causal", "bool", "additive"])
    shape = [n if draw.random.random() < 0.5 else 1 for n in full[draw.random.randrange(len(full)) :]]
    mask = None if kind in ("none", "causal") else draw.tensor(*shape)
    options = {"attn_mask": mask if kind == "additive" or mask is None else mask > -0.5, "is_causal": kind == "causal"}
    options["scale"] = draw.random.choice([None, None, 0.3, -0.7])
    return lambda *tensors, impl: dk.expanded_attention(*tensors, **options, impl=impl), args


def _modulate_concat_attention(draw: Draw) -> tuple[Any, list[Any]]:
    streams, images, tokens, t = draw.size(1, 4), draw.size(1, 3), draw.size(1, 20), draw.size(0, 5)
    heads = draw.size(1, 3)
    p = heads * draw.size(1, 12)
    x = draw.tensor(*(() if draw.random.random() < 0.5 else (streams,)), images, tokens, p)
    shapes = [(streams, p), (streams, p), (streams, t, p), (p,), (p,), (3 * p, p), (3 * p,)]
    args = [x, *(draw.tensor(*shape) for shape in shapes)]
    names = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias")

    def run(x: Tensor, w: Tensor, b: Tensor, tokens: Tensor, *rest: Tensor, impl: str) -> Any:
        return dk.modulate_concat_attention(
            x, w, b, tokens, **dict(zip(names, rest, strict=True)), num_heads=heads, eps=1e-3, impl=impl
        )

    return run, args


PUBLIC = (_token_covariance, _projected_dots, _modulate, _expanded_attention, _modulate_concat_attention)


def public(seed: int) -> str:
    draw = Draw(seed * 1000)
    if draw.random.random() < 0.2:
        return _count(draw)
    make_call = draw.random.choice(PUBLIC)
    function, args = make_call(draw)
    got, exactly, plainly = (
        _outputs_and_gradients(function, [_to(x, dtype) for x in args], impl)
        for dtype, impl in ((None, "auto"), (torch.float64, "reference"), (None, "reference"))
    )
    eps = torch.finfo(draw.dtype).eps
    largest = max(1.0, *(x.abs().max().item() for x in exactly if x.numel()))
    for i, (a, exact, plain) in enumerate(zip(got, exactly, plainly, strict=True)):
        error, budget = accuracy(a, exact, plain.double(), terms=100, eps=max(eps, torch.finfo(a.dtype).eps))
        allowed = 10 * budget + SLACK[draw.dtype] * largest  # a result may be no more than what is left of others
        if not error <= allowed:
            raise Wrong(f"{make_call.__name__}, {draw.dtype}, result {i}: off by {error:.2e}, allowed {allowed:.2e}")
    return make_call.__name__


def _count(draw: Draw) -> str:
    p, k = draw.size(2, 90), draw.size(2, 6)
    grads, basis = draw.tensor(k, *draw.lead(), p), orthogonal(p, draw.seed).to(draw.dtype)
    if draw.random.random() < 0.3:
        basis = draw.tensor(p, p)
    grads = grads * 10.0 ** draw.random.randint(-3, 3)
    rank = sorted(draw.random.sample(range(1, p), min(p - 1, draw.size(1, 3))))
    zero = draw.random.random() < 0.3
    _compare_counts(grads, basis, rank, zero, torch.ops.dtme.count_conflicts(grads, basis, rank, zero))
    return "_count_conflicts"


def _compare_counts(grads: Tensor, basis: Tensor, rank: list[int], zero: bool, got: Any) -> None:
    """Equal but for dots that are rounding errors themselves."""
    wide, u = grads.double(), basis.double()
    want = dk.count_conflicts(wide, u, rank, count_zero_gradients=zero, impl="reference")
    norms = (wide.nan_to_num(0, 0, 0) @ u).norm(dim=-1) + 1e-300
    first, second = torch.triu_indices(len(grads), len(grads), 1)
    tolerance = 1e-4 if basis.dtype in (torch.float16, torch.bfloat16) or grads.dtype != torch.float64 else 1e-11
    for r, m in enumerate(rank):
        dots_of_both = dk.projected_dots(wide, u, m, impl="reference")
        for mine, theirs, dots in zip(got[:2], (want.range, want.null), dots_of_both, strict=True):
            doubtful = (dots.abs() <= tolerance * norms[first] * norms[second]).unsqueeze(1).flatten(1).sum(1)
            off = (mine[r] - theirs[r])[first, second].abs()
            if (off > doubtful).any():
                raise Wrong(f"counts at rank {m} of {tuple(grads.shape)}: {mine[r].tolist()} for {theirs[r].tolist()}")
    if not torch.equal(got[2], want.valid[0] if want.valid.dim() > 2 else want.valid):
        raise Wrong("another number of valid pairs")


def _outputs_and_gradients(function: Any, args: list[Any], impl: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    out = function(*leaves, impl=impl)
    outputs = list(out) if isinstance(out, tuple) else [out]
    weights = [make(*x.shape, dtype=torch.float64, seed=i).to(x.dtype) for i, x in enumerate(outputs)]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    grads = torch.autograd.grad(outputs, tensors, weights, materialize_grads=True)
    return [x.detach() for x in (*outputs, *grads)]


def _to(x: Any, dtype: torch.dtype | None) -> Any:
    return x.to(dtype) if dtype and isinstance(x, Tensor) else x


# --- raw operators ---------------------------------------------------------------------------------------------------

DTYPES_OF_ALL_KINDS = (*DTYPES, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.int32)
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, -(2**40), 2**62, 0.0, 0.5, -2.0, 1e300, float("nan"), float("inf"))


def raw(seed: int) -> str:
    rng = random.Random(seed)
    name = rng.choice([name for name, operator in OPERATORS.items() if isinstance(operator, Operator)])
    operator = OPERATORS[name]
    args = [_detached(x) for x in rng.choice(SAMPLES[name])]
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        with suppress(RuntimeError):  # what torch does not make of these arguments
            _mutate(rng, args)
    copies = _copies(args)
    try:
        got = _results(operator.overload(*copies), copies)
    except REFUSED as error:
        if not str(error):
            raise Wrong(f"{name}: {type(error).__name__} without a word") from error
        return f"{name} refused"
    complaints = []
    for same in (_copies(args), [_double(x) for x in args]):
        try:
            want = _results(operator.overload(*same, impl="reference"), same)
            _compare(name, args, got, want)
        except REFUSED:
            continue
        except Wrong as complaint:
            complaints.append(complaint)
        else:
            return f"{name} right"
    if complaints:  # equal neither to the reference nor to float64: one of them overflows with extreme numbers
        raise complaints[0]
    return f"{name} right"


def _mutate(rng: random.Random, args: list[Any]) -> None:
    i = rng.randrange(len(args))
    x = args[i]
    if isinstance(x, list):
        if x and isinstance(x[0], Tensor) and rng.random() < 0.7:
            _mutate(rng, x)
        else:
            args[i] = rng.choice([x[:-1], x + x, [], x[:1] * 3, [5], [-1, 2], [2, 2], [1, 2, 5]])
    elif isinstance(x, Tensor):
        others = [y for y in args if isinstance(y, Tensor)]
        args[i] = _mutated(rng, x, others)
    elif isinstance(x, bool):
        args[i] = not x
    else:
        args[i] = rng.choice([None, *NUMBERS])


def _mutated(rng: random.Random, x: Tensor, others: list[Tensor]) -> Any:
    dim = rng.randrange(x.dim()) if x.dim() else 0
    n = x.shape[dim] if x.dim() else 0
    if x.numel() > 2**16 or x.is_meta:
        return x
    kind = rng.randrange(16)
    if kind == 0:
        return x.to(rng.choice(DTYPES_OF_ALL_KINDS))
    if kind == 1:
        return rng.choice(others)
    if kind == 2:
        return x.unsqueeze(rng.randint(0, x.dim()))
    if kind == 3:
        return rng.choice([None, x.flatten(), x.reshape(-1)[:1], x.reshape(-1)[:1].squeeze(0), x.reshape(-1)[:0]])
    if kind == 4:
        return x.permute(rng.sample(range(x.dim()), x.dim()))
    if kind == 5:
        shape = [rng.choice([m, 1, 0, 2, 3, 64, 2**49, 2**62]) if rng.random() < 0.3 else m for m in x.shape]
        return x.reshape(-1)[:1].reshape([1] * x.dim()).expand(shape) if x.numel() else x
    if kind == 6 and x.numel():
        strides = [rng.randrange(4) for _ in x.shape]
        shape = [max(1, m - rng.randrange(2)) for m in x.shape]
        reach = 1 + sum((m - 1) * s for m, s in zip(shape, strides, strict=True))
        memory = x.reshape(-1).repeat(-(-(reach + 3) // x.numel()))
        return memory.as_strided(shape, strides, rng.randrange(3))
    if kind == 7 and x.dim():
        return torch.cat([x, x], dim)
    if kind == 8 and n:
        return x.narrow(dim, 0, n - 1)
    if kind == 9 and x.dim():
        return x.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    if kind == 10 and x.is_floating_point():
        bad = x.clone()
        bad.view(-1)[: 1 + bad.numel() // 5] = rng.choice([float("nan"), float("inf"), 0.0, -1e30, 1e-38])
        return bad
    if kind == 11 and x.is_floating_point():
        return torch.complex(torch.zeros(x.shape), -x.float()).conj().imag.to(x.dtype)
    if kind == 12:
        return x[:0] if x.dim() else x
    if kind == 13:
        return x.to("meta")
    if kind == 14:
        return torch.nn.functional.pad(x.view(x.shape), [1, 1] if x.dim() else [])[..., 1:-1] if x.dim() else x
    return x.flip(dim) if x.dim() else x


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else [_detached(y) for y in x] if isinstance(x, list) else x


def _copies(args: list[Any]) -> list[Any]:
    """Their values, strides and memory shared as they were, where something may be written: the accumulator's."""
    first = args[0]
    if not isinstance(first, Tensor) or first.numel() > 2**24 or first.is_meta:
        return list(args)
    try:
        return [first.clone(), *args[1:]]
    except RuntimeError:
        return list(args)


def _double(x: Any) -> Any:
    if isinstance(x, list):
        return [_double(y) for y in x]
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() > 2**24:
        return x
    return x.double()


def _results(out: Any, args: list[Any]) -> list[Tensor]:
    return [args[0]] if out is None else list(out) if isinstance(out, tuple) else [out]


def _compare(name: str, args: list[Any], got: list[Tensor], want: list[Tensor]) -> None:
    if name in ("expanded_attention", "packed_attention", "modulate_layer_norm"):
        got, want = got[:-1], want[:-1]  # the statistics, which the reference has not
    if got[0].is_meta:
        if [x.shape for x in got] != [x.shape for x in want]:
            raise Wrong(f"{name}: other shapes on the meta device than of the reference")
        return
    if any(isinstance(x, float | int) and abs(x) > 1e6 for x in args):
        return  # a scale that makes a whole score of its last bit
    if name == "count_conflicts":
        grads, basis, rank, *zero = args
        if all(x.isfinite().all() for x in (grads, basis)):
            ranks = rank if isinstance(rank, list) else [rank]
            _compare_counts(grads, basis, ranks, bool(zero and zero[0]), got)
        return
    tensors = [x for x in (*got, *args) if isinstance(x, Tensor)]
    tolerance = 6e-2 if any(x.dtype in (torch.float16, torch.bfloat16) for x in tensors) else 2e-3
    # what is left where large numbers cancel is their rounding
    given = [x.double().abs().nan_to_num(0, 0, 0).max().item() for x in args if _has_numbers(x)]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            raise Wrong(f"{name}, result {i}: {tuple(a.shape)} for {tuple(b.shape)}")
        a, b = a.double(), b.double()
        usable = b.abs() < 1e4  # beyond, what overflows in which dtype is anybody's
        size = max(0.0, *given, b[usable].abs().max().item() if usable.any() else 0.0)
        off = (a - b)[usable].abs().max().item() if usable.any() and b.isfinite().all() else 0.0
        if not off <= tolerance * (1 + size):
            raise Wrong(f"{name}, result {i}: off by {off:.2e} of {size:.2e}; {_shown(args)}")


def _has_numbers(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and 0 < x.numel() <= 2**24


def _shown(x: Any) -> str:
    if isinstance(x, list):
        return f"[{', '.join(map(_shown, x))}]"
    return f"{str(x.dtype)[6:]}{tuple(x.shape)}{x.stride()}" if isinstance(x, Tensor) else repr(x)


# --- the run ---------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=["public", "raw"])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="of the first call; by default from the clock")
    parser.add_argument("--only", type=int, default=None, metavar="SEED", help="this call alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = {"public": public, "raw": raw}[options.kind]
    first = options.only if options.only is not None else options.seed
    first = time.time_ns() // 1000 % 2**40 if first is None else first
    calls, wrong, kinds, start = 1 if options.only is not None else options.calls, 0, Counter[str](), time.monotonic()
    print(f"{options.kind}: {calls:,} calls from seed {first}", flush=True)
    for i in range(calls):
        try:
            kinds[run(first + i)] += 1
        except Exception as error:
            wrong += 1
            print(f"WRONG --only {first + i}: {error}", flush=True)
            if not isinstance(error, Wrong):
                traceback.print_exc()
            if wrong == 20:
                break
        if i % max(1, calls // 20) == max(1, calls // 20) - 1:
            print(f"{i + 1:>9,} calls, {wrong} wrong, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{sum(kinds.values()) + wrong:,} calls, {wrong} wrong")
    for kind, number in sorted(kinds.items()):
        print(f"{number:>9,}  {kind.lstrip('_')}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
