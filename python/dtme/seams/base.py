"""What every way into an attention has in common, and what a library's file tells about its blocks.

A seam answers two questions about one attention module: which keys and values does it make of given tokens, and how
does it run with its inner product replaced? The attention keeps its own projections, norms and masks. A seam holds no
state of a running forward: threads share it.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..caches import Sizes, cached_sizes
from ..torch_private import num_hooks
from ..written_out import attention_weights

KeysValues = tuple[Tensor, Tensor]
"""(T, H, t, d) each: T streams, H heads, t task tokens of d channels."""
Attend = Callable[..., Tensor]
"""As ``scaled_dot_product_attention``: query, key, value (rows, H, N, d) → (rows, H, N, d); with None for the value,
the weights of the keys, (rows, H, N, M)."""


class Projection(NamedTuple):
    """What is before the inner product of an attention that does nothing else there."""

    weight: Tensor
    """(3p, p): rows of query, key and value, heads within."""
    bias: Tensor | None
    num_heads: int
    scale: float
    finish: Callable[[Tensor], Any]
    """What the attention makes of its heads' merged output (rows, N, p)."""


class NotExpandable(ValueError):
    """A block that task tokens cannot be added to correctly; says why."""


class Seam(ABC):
    """One attention module, seen from its block ``block``."""

    is_square = True
    """Whether there are as many queries as keys: else tokens of a coarser grid are attended to, say."""

    copied = False
    """Whether ``run`` is a copy of the attention's forward, which has to be compared with the installed release's."""

    def __init__(self, block: str, attention: Any) -> None:
        self.block, self.attention = block, attention
        self._required = required_parameters(attention.forward)
        self._names = list(inspect.signature(type(attention).forward).parameters)[1:]
        layers = {
            module.layer_idx for module in attention.modules() if isinstance(getattr(module, "layer_idx", None), int)
        }
        self._layer = layers.pop() if len(layers) == 1 else None  # of a key-value cache
        self._rotary = "position_embeddings" in inspect.signature(attention.forward).parameters
        # of the cosines and sines of task tokens: some models halve them, and want them as wide as a head
        widths = (getattr(attention, name, None) or 1 for name in ("head_dim", "qk_rope_head_dim"))
        self._widths = tuple(dict.fromkeys((1, *widths))) if self._rotary else (1,)

    def install(self, forward: Callable[..., Any]) -> None:
        self.attention.forward = forward

    def remove(self) -> None:
        del self.attention.forward

    def check_hooks(self) -> None:  # noqa: B027
        """Refuse hooks of others that would see something else than the attention's own tensors."""

    def num_tokens(self) -> int:
        """How many tokens this attention can be tried on: any number, unless it attends in windows."""
        return 5

    def cached_sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes | str | None:
        """How many queries and keys there will be with the cache that the attention is about to be given, if it is."""
        return cached_sizes(self._layer, self._names, args, kwargs)

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """What the attention makes of (T, t, p) tokens."""
        caught: list[KeysValues] = []

        def catch(query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any) -> Tensor:
            if value is None:
                return attention_weights(query, key)
            if self.is_square and query.shape[-2] != key.shape[-2]:
                raise NotExpandable(f"block {self.block!r}: its attention is not of its tokens to each other")
            caught.append((key, value))
            # a copy: what comes out may be written to, and what was caught must not be
            return value.clone() if value.shape[:-1] == query.shape[:-1] else query.clone()

        catch.only_keys = True  # type: ignore[attr-defined]

        options: dict[str, Any] = dict.fromkeys(self._required)
        for width in self._widths:
            if self._rotary:
                options["position_embeddings"] = no_positions(tokens, width)
            caught.clear()
            try:
                self.run(catch, tokens, **options)
            except NotExpandable:
                raise
            except Exception as error:  # whatever an attention raises that was not made for tokens alone
                if width == self._widths[-1]:
                    problem = f"its attention cannot run on task tokens alone: {error}"
                    raise NotExpandable(f"block {self.block!r}: {problem}") from error
                continue
            if len(self._widths) > 1:  # the first time, when the block is tried
                self._widths = (width,)
            break
        if len(caught) != 1:
            raise NotExpandable(f"block {self.block!r}: its attention attends {len(caught)} times, not once")
        ((key, value),) = caught
        if key.shape[-2] != tokens.shape[1]:
            kinds = f"{key.shape[-2]} keys of {tokens.shape[1]} task tokens"
            raise NotExpandable(f"block {self.block!r}: its attention makes {kinds}")
        return key, value

    @abstractmethod
    def run(self, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        """The attention's own forward, with ``attend`` for its inner product."""

    def projection(self) -> Projection | None:
        """What the attention projects with, if it projects, attends, projects back and does nothing else; else None."""
        return None


class Copied(Seam):
    """An attention whose forward is copied, so that its projections are at hand."""

    copied = True

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (rows, H, N, d) of tokens (rows, N, p)."""

    def keys_values(self, tokens: Tensor) -> KeysValues:
        return self.project(tokens)[1:]


def by_head(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projections (rows, N, 3p), query, key and value side by side, as (rows, H, N, d) each."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


class Unknown(Enum):
    UNKNOWN = "unknown"


UNKNOWN = Unknown.UNKNOWN
"""No library's file says what this argument means."""
Axes = Mapping[int, int | None]
"""By the number of a tensor's dimensions: the axis that its images lie on, or None where all images share it."""


def all_shared(*names: str) -> dict[str, Axes]:
    """Arguments whose tensors, of whatever shape, are the same for all images."""
    return dict.fromkeys(names, dict.fromkeys(range(9)))


@dataclass(frozen=True)
class Library:
    """What one file of this package tells about one library."""

    name: str
    """The top-level module in which the library's blocks are defined."""
    seam: Callable[[nn.Module], "type[Seam] | str | None"]
    """For a module itself, not a child of it: its seam; or a sentence why this attention has none; or None."""
    arguments: Mapping[str, Axes] = field(default_factory=dict)
    """What the arguments of the library's blocks mean, by name."""
    norms: Mapping[tuple[str, str], str | None] = field(default_factory=dict)
    """Blocks, by module and class, between whose norm and attention tokens are only rearranged: the norm's attribute,
    or None where the attention reads the block's tokens themselves. Such blocks cannot be tried on plain tokens."""

    def defines(self, block: nn.Module) -> bool:
        """Whether the forward that runs is the library's, rather than a subclass's or a replacement."""
        module = getattr(inspect.unwrap(type(block).forward), "__module__", None) or ""
        return "forward" not in vars(block) and module.partition(".")[0] == self.name


def no_positions(tokens: Tensor, width: int = 1) -> tuple[Tensor, Tensor]:
    """The cosines and sines of tokens (rows, N, p) without a position; one channel is for all of a head to share."""
    still = tokens.new_ones(1, tokens.shape[1], width)
    return still, torch.zeros_like(still)


def required_parameters(forward: Callable[..., Any]) -> list[str]:
    """Parameters without a default, but for the first, which takes the tokens."""
    _, *others = inspect.signature(forward).parameters.values()
    return [o.name for o in others if o.default is o.empty and o.kind is o.POSITIONAL_OR_KEYWORD]


def names_in_forward(module: nn.Module) -> set[str]:
    """All attributes and globals that the class's forward names."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(getattr(code, "co_names", ()))


def class_of(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_plain_linear(module: Any) -> bool:
    """No subclass, nothing that hangs on it, no weight that is quantised or shared among devices."""
    own = type(module) is nn.Linear and "forward" not in vars(module) and not is_hooked(module)
    return own and type(module.weight) is nn.Parameter


def is_hooked(module: nn.Module, own_before: int = 0, own_after: int = 0) -> bool:
    """Whether somebody wants to see, or change, what goes in or comes out; not counting as many hooks of our own."""
    before, after, backward = num_hooks(module)
    return before > own_before or after > own_after or backward
