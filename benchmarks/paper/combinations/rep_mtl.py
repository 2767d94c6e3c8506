"""Rep-MTL."""

import torch
from torch import Tensor, nn

import dtme

from ..arms import Batch, Combination, Facts
from ..tasks import Tasks
from .weights import check_not_negative


class RepMTL(Combination):
    """Two penalties on the tasks' saliencies, the gradients of their losses by the representation that they share.

    Wang, Li, Xu: Rep-MTL: Unleashing the Power of Representation-level Task Saliency for Multi-Task Learning (ICCV
    2025, arXiv 2507.21049), whose code is not public. The loss is equation 10, Σ L_t + λ_tsr L_tsr + λ_csa L_csa:

    - S_t = ∂L_t/∂Z (3), where Z are the tokens that the backbone puts out, (B, N, C): N tokens for the paper's H'W'
      pixels, class and register tokens included.
    - TSR: per token, the mean of S_t over channels (4), its magnitude over the sum of all tasks' (5), and the entropy
      of that distribution over tasks (6), averaged.
    - CSA: an affinity M_t = S_tᵀ S_t, (C, C), per image (7). The anchor of an image is A Aᵀ, where A, (C, T), holds the
      means of S_t over tokens (8 and figure 2). Per image, minus the logarithm of exp(sim(anchor, M_t) / τ) over the
      sum of exp(sim(anchor, other's anchor) / τ) over the batch's other images, with cosines for sim (9).

    What the paper leaves open, as settled here: equation 9 does not say which t; it is averaged over tasks. τ is not
    printed; 0.1. Both λ are 0.9, the value that the paper holds one at while it varies the other; it chooses each among
    0.7, 0.9, 1.1, 1.3, 1.5 per data set. All published results take logarithms of the losses first (appendix A), which
    is what ``logarithm`` is; equation 10 has none.

    Deviations: a token where no task has a saliency (heads that read the class token alone) is left out of TSR's mean,
    an image where a task has none out of CSA's. A task whose loss is zero takes no part in the step. A batch of one has
    no negatives, and no CSA.

    The model has to be a ``dtme.MultiTaskModel`` in which all tasks read one tensor of the backbone. Where tasks have
    streams of their own there is no shared representation, and a step is refused.

    Args:
        saliency: λ_tsr.
        alignment: λ_csa.
        temperature: τ.
        logarithm: whether L_t is the logarithm of the task's loss.
    """

    one_device_only = "it compares the images of a whole batch, and reads the features inside the model"
    penalties: Tensor

    def __init__(
        self,
        tasks: Tasks,
        saliency: float = 0.9,
        alignment: float = 0.9,
        temperature: float = 0.1,
        logarithm: bool = True,
    ) -> None:
        super().__init__(tasks)
        self.saliency, self.alignment, self.temperature = saliency, alignment, temperature
        self.logarithm = logarithm
        self.register_buffer("penalties", torch.zeros(2))

    def prepare(self, model: nn.Module) -> None:
        if not isinstance(model, dtme.MultiTaskModel):
            raise ValueError(f"Rep-MTL needs a dtme.MultiTaskModel, got {type(model).__name__}")

    def step(self, model: nn.Module, batch: Batch, tasks: Tasks) -> dict[str, Tensor]:
        self.prepare(model)
        x, labels = batch
        tokens = shared_tokens(model, x, self.names)
        losses = self.measure(model.predict(dict.fromkeys(model.tasks, tokens), self.names), labels, tasks)
        present = {name: loss for name, loss in losses.items() if loss.detach() != 0}
        if self.logarithm:
            check_not_negative(present)
            present = {name: loss.log() for name, loss in present.items()}
        if present:
            saliencies = torch.stack(
                [torch.autograd.grad(loss, tokens, create_graph=True)[0] for loss in present.values()]
            )
            entropy = saliency_entropy(saliencies)
            alignment = alignment_loss(saliencies, self.temperature)
            total = torch.stack(list(present.values())).sum()
            (total + self.saliency * entropy + self.alignment * alignment).backward()
            self.penalties = torch.stack([entropy.detach(), alignment.detach()])
        return {name: loss.detach() for name, loss in losses.items()}

    def facts(self) -> Facts:
        """L_tsr and L_csa of the last step."""
        return dict(zip(("saliency_entropy", "alignment_loss"), self.penalties.tolist(), strict=True))


def shared_tokens(model: dtme.MultiTaskModel, x: object, names: tuple[str, ...]) -> Tensor:
    """Z, (B, N, C), with a graph also where the backbone is frozen.

    Raises:
        ValueError: the tasks do not read one tensor of three dimensions.
    """
    features = model.extract(x, names)
    tokens = features[names[0]]
    if any(feature is not tokens for feature in features.values()):
        raise ValueError(
            "Rep-MTL is about one representation that all tasks read, but this model has streams of their own for "
            f"{', '.join(names)}: train it with another combination, or Rep-MTL with a model that is not expanded"
        )
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"Rep-MTL needs features (images, tokens, channels), got {shape}")
    return tokens if tokens.requires_grad else tokens.detach().requires_grad_()


def saliency_entropy(saliencies: Tensor) -> Tensor:
    """L_tsr of (T, B, N, C), equations 4 to 6."""
    magnitudes = saliencies.mean(-1).abs()
    total = magnitudes.sum(0)
    is_salient = total > 0
    shares = magnitudes / torch.where(is_salient, total, 1.0)
    smallest = torch.finfo(shares.dtype).tiny  # 0 log 0 = 0, and so its gradient
    entropies = -(shares * shares.clamp(min=smallest).log()).sum(0)
    return entropies.sum() / is_salient.sum().clamp(min=1)


def alignment_loss(saliencies: Tensor, temperature: float) -> Tensor:
    """L_csa of (T, B, N, C), equations 7 to 9.

    The (C, C) matrices are never formed: ⟨A Aᵀ, Sᵀ S⟩ = ‖S A‖² and ⟨A Aᵀ, B Bᵀ⟩ = ‖Aᵀ B‖². Cosines do not change with
    the scale, so squares of squares of small gradients are kept from vanishing.
    """
    images = saliencies.shape[1]
    if images < 2:
        return saliencies.sum() * 0.0
    sizes = torch.linalg.vector_norm(saliencies.detach(), dim=(2, 3))  # (T, B)
    anchors = (saliencies / _nonzero(sizes.amax(0))[:, None, None]).mean(2)  # (T, B, C)
    products = torch.einsum("tbc,ukc->bktu", anchors, anchors).square().sum((2, 3))  # (B, B)
    has_anchor = products.detach().diagonal() > 0
    lengths = _nonzero(products.diagonal()).sqrt()

    own = saliencies / _nonzero(sizes)[..., None, None]
    grams = own @ own.mT if own.shape[2] < own.shape[3] else own.mT @ own  # of the same norm
    affinities = _nonzero(grams.square().sum((2, 3))).sqrt()
    positives = torch.einsum("tbnc,ubc->tbnu", own, anchors).square().sum((2, 3)) / (affinities * lengths)

    others = has_anchor & ~torch.eye(images, dtype=torch.bool, device=products.device)
    negatives = (products / (lengths[:, None] * lengths) / temperature).masked_fill(~others, -torch.inf)
    counted = (sizes > 0) & has_anchor & others.any(1)
    if not counted.any():
        return saliencies.sum() * 0.0
    negatives = torch.where(others.any(1)[:, None], negatives, 0.0).logsumexp(1)
    return (negatives - positives / temperature)[counted].mean()


def _nonzero(values: Tensor) -> Tensor:
    """To be divided by: 1 where it is 0."""
    return torch.where(values > 0, values, 1.0)
