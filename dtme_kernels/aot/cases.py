"""Launches of every kernel for real shapes: what ``dtme_kernels.aot`` compiles."""

from collections.abc import Callable
from functools import partial

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases() -> dict[str, Callable[[], object]]:
    """{name: a launch} of every configuration: widths that tile well and ill, every dtype, 2 to 16 tasks."""
    return _covariance_cases() | _conflict_cases() | _modulation_cases() | _attention_cases() | _cases_of_one()


def precisions(name: str) -> tuple[str, ...]:
    """The matrix precisions under which a case is compiled: at "high", float32 is multiplied by other kernels."""
    if any(f"d={d} fp32" in name for d in (80, 128, 256)):
        return ("high",)  # at "highest" the reference's
    if "fp32" not in name.partition(",")[0] or (name.startswith("conflicts") and "K=5 fp32, basis fp32" not in name):
        return ("highest",)  # of conflicts, fewer products of the same tiles
    return "highest", "high"


def _covariance_cases() -> dict[str, Callable[[], object]]:
    from ..covariance import kernel

    found: dict[str, Callable[[], object]] = {}
    for name, dtype in DTYPES.items():
        for p in (192, 768, 321):
            tokens, square = torch.empty(6, 1024, p, dtype=dtype, device="meta"), torch.empty(p, p, device="meta")
            if name == "fp16" and p != 768:
                continue  # bfloat16's kernels but for the type
            found[f"covariance p={p} {name}"] = partial(kernel.token_covariance, tokens)
            found[f"covariance backward p={p} {name}"] = partial(kernel.token_covariance_backward, square, tokens)
        layers = [torch.empty(6, 1024, 768, dtype=dtype, device="meta")] * 12
        sums = torch.empty(12, 768, 768, dtype=torch.float64, device="meta")
        found[f"covariance of 12 layers p=768 {name}"] = partial(kernel.token_covariance_, sums, layers)
    return found


def _conflict_cases() -> dict[str, Callable[[], object]]:
    from ..conflicts import kernel

    found: dict[str, Callable[[], object]] = {}
    # the most tasks of every tile, and few; float16 is bfloat16's kernels but for the one that reads gradients
    for num_tasks, name, basis in (
        *((2, "bf16", "fp32"), (3, "fp32", "fp32"), (5, "bf16", "fp32"), (5, "bf16", "bf16"), (5, "fp16", "fp32")),
        *((5, "fp32", "fp32"), (8, "bf16", "fp32"), (8, "fp32", "fp32"), (16, "fp32", "fp32")),
    ):
        grads = torch.empty(num_tasks, 6144, 768, dtype=DTYPES[name], device="meta")
        u = torch.empty(768, 768, dtype=DTYPES[basis], device="meta")
        found[f"conflicts K={num_tasks} {name}, basis {basis}"] = partial(kernel.count_conflicts, grads, u, [250])
    for num_tasks in (5, 16):  # its kernel sees float32 only, whatever the gradients are
        dots = torch.empty(num_tasks * (num_tasks - 1) // 2, 6144, device="meta")
        grads = torch.empty(num_tasks, 6144, 768, device="meta")
        found[f"dots backward K={num_tasks}"] = partial(kernel.projected_dots_backward, dots, dots, grads, u, 256)
    # no stride that a vector fits
    grads, u = torch.empty(5, 6, 49, 81, device="meta"), torch.empty(81, 81, dtype=torch.float64, device="meta")
    ranks = [2, 9, 20, 30, 40]
    found["conflicts K=5 p=81 fp32, basis fp64, five ranks"] = partial(kernel.count_conflicts, grads, u, ranks)
    return found


def _modulation_cases() -> dict[str, Callable[[], object]]:
    from ..modulation import kernel

    found: dict[str, Callable[[], object]] = {}
    sizes = {768: (1, 3, 5, 6), 192: (5, 16), 1280: (5,), 321: (5,), 4096: (2,)}
    for p, streams in sizes.items():
        for num_streams in streams:
            for name, dtype in DTYPES.items():
                if name == "fp16" and (p, num_streams) != (768, 5):
                    continue  # bfloat16's kernels but for the type
                tokens = torch.empty(6, 1024, p, dtype=dtype, device="meta")
                grad = tokens.new_empty(num_streams, 6, 1024, p)
                w, gain = (torch.empty(*shape, device="meta") for shape in ((num_streams, p), (p,)))
                case = f"T={num_streams} p={p} {name}"
                if (p, num_streams) in ((768, 5), (321, 5)):  # the norm's kernels with less to do
                    found[f"modulate {case}"] = partial(kernel.modulate, tokens, w, w)
                    found[f"modulate backward {case}"] = partial(kernel.modulate_backward, grad, tokens, w)
                found[f"norm {case}"] = partial(kernel.modulate_layer_norm, tokens, w, w, gain, gain, 1e-6)
                statistics = torch.empty(2, num_streams, 6, 1024, device="meta")
                backward = partial(kernel.modulate_layer_norm_backward, grad, grad, statistics)
                found[f"norm backward {case}"] = partial(backward, tokens, w, w, gain, 1e-6)
                if (p, num_streams) == (768, 5):
                    found[f"norm backward {case}, tokens in streams"] = partial(backward, grad, w, w, gain, 1e-6)
    many = torch.empty(1, 2**31, 64, dtype=torch.bfloat16, device="meta")  # rows that 64 bits count
    w = torch.empty(1, 64, device="meta")
    found["norm T=1 p=64 bf16, 2^31 rows"] = partial(kernel.modulate_layer_norm, many, w, w, w[0], w[0], 1e-6)
    rest = (torch.empty(2, 1, 2**31, device="meta"), many, w, w, w[0], 1e-6)
    backward = partial(kernel.modulate_layer_norm_backward, many[None], many[None])
    found["norm backward T=1 p=64 bf16, 2^31 rows"] = partial(backward, *rest)
    return found


def _attention_cases() -> dict[str, Callable[[], object]]:
    """Packed as a projection leaves them, and with masks; 1,024 keys, or so many that some are left beside the tiles.

    Strides get no kernels of their own, so what is compiled for packed tensors is what separate ones run.
    """
    from ..attention import kernel
    from ..attention.arguments import AttentionBackward, PackedBackward, unpack

    found: dict[str, Callable[[], object]] = {}

    def add(d: int, dtype: str, kinds: tuple[str, ...] = ("",), keys: int = 1024, task_keys: int = 6) -> None:
        shared = torch.empty(2, 3, keys, 3, 4, d, dtype=DTYPES[dtype], device="meta")
        task = torch.empty(2, task_keys, 2, 4, d, dtype=DTYPES[dtype], device="meta")
        packed = unpack(shared, task)
        query = packed.query
        square = torch.empty(keys, keys, dtype=DTYPES[dtype], device="meta")
        masks: dict[str, tuple[torch.Tensor | None, bool]] = {"": (None, False)}
        masks |= {", causal": (None, True), ", bool mask": (square.bool(), False), ", mask": (square, False)}
        for kind in kinds:
            case = f"d={d} {dtype}{kind}"
            mask, causal = masks.get(kind, (None, False))
            arguments = packed._replace(attn_mask=mask, is_causal=causal)
            saved = query, query, torch.empty(arguments.statistics_shape, device="meta")
            found[f"attention {case}"] = partial(kernel.expanded_attention, arguments)
            backward: Callable[[], object] = partial(
                kernel.expanded_attention_backward, AttentionBackward(*saved, arguments, mask is square)
            )
            if mask is None and not causal:
                backward = partial(kernel.packed_attention_backward, PackedBackward(*saved, shared, task, None))
            found[f"attention backward {case}"] = backward

    add(64, "bf16", ("", ", causal", ", bool mask", ", mask"))
    add(64, "fp32", ("", ", mask"))
    add(64, "fp16")
    # tiles of one table row differ by what their channels are filled up with; keys beside the tiles cost most registers
    for d in (32, 64, 72, 80, 96, 128, 256):
        add(d, "bf16", (", keys left",), 1020, 22)
    for d in (32, 80, 128, 256):
        add(d, "fp32", (", keys left",), 1020, 22)
    return found


def _cases_of_one() -> dict[str, Callable[[], object]]:
    """Triton makes constants of sizes and strides of 1: of a tensor's, here all of them."""
    from ..attention import kernel as attention
    from ..attention.arguments import Attention, AttentionBackward
    from ..conflicts import kernel as conflicts
    from ..modulation import kernel as modulation

    half = partial(torch.empty, device="meta", dtype=torch.float16)
    one = [*[half(1, 1, 1, 1, 16)] * 3, *[half(1, 1, 1, 16)] * 2]
    arguments = Attention(one[0], one[0], one[0], one[3], one[3], half(1, 1))
    saved = AttentionBackward(one[0], one[0], torch.empty(1, 1, 1, 2, 1, device="meta"), arguments, True)
    token, row = torch.empty(1, 1, 16, device="meta"), torch.empty(1, 16, device="meta")
    grads, basis = torch.empty(2, 1, 16, device="meta"), torch.empty(16, 16, device="meta")
    statistics = torch.empty(2, 1, 1, 1, device="meta")
    norm = partial(modulation.modulate_layer_norm_backward, token[None], token[None], statistics)
    return {
        "ones: attention": partial(attention.expanded_attention, arguments),
        "ones: attention backward": partial(attention.expanded_attention_backward, saved),
        "ones: norm": partial(modulation.modulate_layer_norm, token, row, row, row[0], row[0], 1e-6),
        "ones: norm backward": partial(norm, token, row, row, row[0], 1e-6),
        "ones: conflicts": partial(conflicts.count_conflicts, grads, basis, [1]),
    }
