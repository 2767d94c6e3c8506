"""Arguments of every operator of ``torch.ops.dtme``, and of every public function that is differentiable."""

import torch

import dtme_kernels as dk
from dtme_kernels.testing import make

T, P, RANK, HEADS = 3, 6, 2, 2
SHAPES = {
    "token_covariance": lambda batch: [(batch, 5, P)],
    "count_conflicts": lambda batch: [(T, batch, 5, P), (P, P)],
    "projected_dots": lambda batch: [(T, batch, 5, P), (P, P)],
    "modulate": lambda batch: [(batch, 5, P), (T, P), (T, P)],
    "modulate_layer_norm": lambda batch: [(batch, 5, P), (T, P), (T, P), (P,), (P,)],
    "expanded_attention": lambda batch: [(T, batch, 2, 5, 4)] * 3 + [(T, 2, 2, 4)] * 2,
    "modulate_concat_attention": lambda batch: [
        *[(batch, 5, P), (T, P), (T, P), (T, 2, P)],
        *[(P,), (P,), (3 * P, P), (3 * P,)],
    ],
}
DIFFERENTIABLE = sorted(SHAPES.keys() - {"count_conflicts"})
NUMBERS = {"count_conflicts": [RANK], "projected_dots": [RANK], "modulate_concat_attention": [HEADS]}


def arguments(name, batch=2, dtype=torch.float32, grad=True):
    """Positional arguments of an operator."""
    shapes = SHAPES[name](batch)
    tensors = [make(*shape, dtype=dtype, seed=s, requires_grad=grad) for s, shape in enumerate(shapes)]
    return [*tensors, *NUMBERS.get(name, [])]


def call(name, *args, **options):
    """The public function, on an operator's positional arguments."""
    if name == "modulate_concat_attention":
        names = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "num_heads")
        options, args = options | dict(zip(names, args[4:], strict=True)), args[:4]
    result = getattr(dk, name)(*args, **options)
    if name == "count_conflicts":
        return result.range, result.null, result.valid
    return (result,) if isinstance(result, torch.Tensor) else result


def gradients(outputs, args):
    """Of the sum of squares of all outputs; none of integers."""
    loss = sum(out.double().square().sum() for out in outputs if out.is_floating_point())
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(loss, leaves) if isinstance(loss, torch.Tensor) else ()


def backward_arguments(name, *grads, keep=None):
    """Arguments of a backward operator: the gradients of the outputs, then what was saved."""
    return [*(make(*shape, layout="expanded") for shape in grads), *arguments(name, grad=False)[:keep]]


def lower(args):
    """In bfloat16, but for the statistics, of which there is one then."""
    grad, output, statistics, *inputs = args
    return [grad.bfloat16(), output.bfloat16(), statistics[:, :, :, :1], *(x.bfloat16() for x in inputs)]


TOKENS, OUT, MASK = (2, 5, P), (T, 2, 5, P), make(2, 1, 5, 5, seed=5)
ATTENTION, ATTENTION_BACKWARD = (
    arguments("expanded_attention"),
    backward_arguments("expanded_attention", (T, 2, 2, 5, 4), (T, 2, 2, 5, 4), (T, 2, 2, 2, 5)),
)
SAMPLES = {name: [arguments(name), arguments(name, dtype=torch.bfloat16, grad=False)] for name in SHAPES}
SAMPLES["token_covariance"] += [[make(0, P)], [make(P)]]
SAMPLES["token_covariance_"] = [
    [torch.zeros(P, P, dtype=torch.float64), [make(*TOKENS)]],
    [torch.zeros(2, P, P), [make(*TOKENS), make(3, P, dtype=torch.float16)]],
]
SAMPLES["token_covariance_backward"] = [[make(P, P), make(*TOKENS, layout="transposed")]]
SAMPLES["count_conflicts"] += [[*arguments("count_conflicts", batch=0), True]]
SAMPLES["projected_dots"] += [[make(2, P, layout="transposed"), make(P, P), 1]]
SAMPLES["projected_dots_backward"] = [backward_arguments("projected_dots", (T, 2, 5), (T, 2, 5))]
SAMPLES["modulate"] += [[make(*OUT, layout="transposed"), *arguments("modulate")[1:]]]
SAMPLES["modulate_backward"] = [backward_arguments("modulate", OUT, keep=2)]
SAMPLES["modulate_layer_norm_backward"] = [
    [*backward_arguments("modulate_layer_norm", OUT, OUT, (2, *OUT[:-1]), keep=4), 1e-6]
]
SAMPLES["expanded_attention"] += [
    [x.detach()[0] for x in ATTENTION],
    [*ATTENTION, MASK],
    [*ATTENTION, MASK.clone().requires_grad_()],
    [*ATTENTION, MASK > 0],
    [*ATTENTION, None, True, 0.3],
]
SAMPLES["expanded_attention_backward"] = [
    [*lower(ATTENTION_BACKWARD), None, True, None, False],
    [*ATTENTION_BACKWARD, None, False, None, False],
    [*ATTENTION_BACKWARD, MASK, False, 0.5, True],
    [*ATTENTION_BACKWARD, MASK > 0, False, None, False],
]
QKV, TASK_KV = make(T, 2, 5, 3, 2, 4, requires_grad=True), make(T, 2, 2, 2, 4, seed=1, requires_grad=True)
SAMPLES["packed_attention"] = [[QKV, TASK_KV], [QKV.detach().bfloat16(), TASK_KV.detach().bfloat16(), 0.3]]
SAMPLES["packed_attention_backward"] = [
    [make(T, 2, 2, 5, 4), make(T, 2, 2, 5, 4), make(T, 2, 2, 2, 5), QKV.detach(), TASK_KV.detach(), None]
]
SAMPLES["modulate_concat_attention"] += [[*arguments("modulate_concat_attention")[:7], None, 3, 1e-5, 0.2]]
