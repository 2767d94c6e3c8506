"""The second moments of a whole data set, one batch at a time (Eq. 1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_tensors
from .covariance import token_covariance_


class StreamingCovariance:
    """Accumulate ``C = (1/n) sum T T^T`` over n samples, for one layer or for all layers of a network at once.

    The running sum is float64 by default, so that thousands of small updates are not lost in it.

    Args:
        num_features: p, channels per token.
        num_layers: None for a (p, p) result, D for (D, p, p).
        device: where the sum lives and where tokens must be.
        dtype: of the sum, float64 or float32.

    Attributes:
        accumulator: the sum so far, (p, p) or (D, p, p).
        num_samples: images seen.
        num_tokens: tokens seen by a layer; by the first one, where layers differ.

    Raises:
        TypeError: ``dtype`` is not float32 or float64.
        ValueError: ``num_features`` or ``num_layers`` is not at least 1.
    """

    def __init__(
        self,
        num_features: int,
        num_layers: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        for name, size in (("num_features", num_features), ("num_layers", num_layers)):
            if size is None and name == "num_layers":
                continue
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        layers = () if num_layers is None else (num_layers,)
        self.accumulator = torch.zeros(*layers, num_features, num_features, device=device, dtype=dtype)
        self.num_samples = 0
        self.num_tokens = 0

    @torch.no_grad()
    def update(self, tokens: Tensor | Sequence[Tensor]) -> None:
        """Add a batch.

        Args:
            tokens: (B, N, p), or one such tensor a layer: B is common to all, N is a layer's own.

        Raises:
            TypeError, ValueError: as ``token_covariance_``; or a tensor is not (B, N, p), or B differs between layers.
                Nothing was added then.
        """
        layers = {"tokens": tokens} if isinstance(tokens, Tensor) else {f"tokens[{d}]": x for d, x in enumerate(tokens)}
        check_tensors(**layers)
        for name, x in layers.items():
            if x.dim() != 3:
                raise ValueError(f"{name} must be (B, N, p), got {tuple(x.shape)}")
        samples = [len(x) for x in layers.values()]
        if len(set(samples)) > 1:
            raise ValueError(f"tokens must have the same B in every layer, got {samples}")
        token_covariance_(self.accumulator, tokens)
        num_samples, num_tokens, _ = next(iter(layers.values())).shape
        self.num_samples += num_samples
        self.num_tokens += num_samples * num_tokens

    def compute(self) -> Tensor:
        """Return ``(1/n) sum T T^T``, (p, p) or (D, p, p), in the accumulator's dtype.

        Raises:
            ValueError: no sample was seen, or a token was NaN or Inf (or their sum overflowed): the layers are named.
        """
        if self.num_samples == 0:
            raise ValueError("compute() needs at least one update() with samples")
        finite = self.accumulator.isfinite().flatten(-2).all(-1)
        if not finite.all():
            where = "tokens" if finite.dim() == 0 else f"tokens of layers {(~finite).nonzero().flatten().tolist()}"
            raise ValueError(f"{where} hold NaN or Inf, or their second moment overflowed")
        return self.accumulator / self.num_samples

    def reset(self) -> None:
        """Forget everything."""
        self.accumulator.zero_()
        self.num_samples = self.num_tokens = 0

    def merge_(self, other: "StreamingCovariance") -> "StreamingCovariance":
        """Add what ``other``, of the same shape, has seen. Raises ValueError on another shape."""
        if not isinstance(other, StreamingCovariance):
            raise TypeError(f"other must be a StreamingCovariance, got {type(other).__name__}")
        if other.accumulator.shape != self.accumulator.shape:
            shapes = f"{tuple(self.accumulator.shape)}, got {tuple(other.accumulator.shape)}"
            raise ValueError(f"other must accumulate {shapes}")
        self.accumulator += other.accumulator.to(self.accumulator)
        self.num_samples += other.num_samples
        self.num_tokens += other.num_tokens
        return self

    def all_reduce_(self, group: Any = None) -> "StreamingCovariance":
        """Sum over the processes of ``group``, once, after the last update. Raises RuntimeError outside a group."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError("all_reduce_() needs torch.distributed.init_process_group() first")
        counts = torch.tensor([self.num_samples, self.num_tokens], device=self.accumulator.device)
        distributed.all_reduce(self.accumulator, group=group)
        distributed.all_reduce(counts, group=group)
        self.num_samples, self.num_tokens = counts.tolist()
        return self

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: ``accumulator``, ``num_samples``, ``num_tokens``."""
        return {
            "accumulator": self.accumulator.clone(),
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``. Raises ValueError, with nothing loaded, where it does not fit."""
        if not isinstance(state, Mapping) or state.keys() != {"accumulator", "num_samples", "num_tokens"}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must hold accumulator, num_samples and num_tokens, got {got}")
        accumulator, counts = state["accumulator"], (state["num_samples"], state["num_tokens"])
        shape = tuple(accumulator.shape) if isinstance(accumulator, Tensor) else type(accumulator).__name__
        if shape != self.accumulator.shape:
            raise ValueError(f"state['accumulator'] must be {tuple(self.accumulator.shape)}, got {shape}")
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"state['num_samples'] and state['num_tokens'] must be integers >= 0, got {counts}")
        self.accumulator.copy_(accumulator)
        self.num_samples, self.num_tokens = counts
