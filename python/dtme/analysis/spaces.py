"""The token space of every block: its second moment, streamed, then split (Eq. 1-3)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtme_kernels import StreamingCovariance, split_token_space

from ..blocks import BlockError
from ..ranks import Ranks

SETTLED = 0.01
"""How much ranks, as shares of the channels, and energies may still change where a token space is settled."""


class Space(NamedTuple):
    """The tokens of one block."""

    basis: Tensor
    """(p, p), eigenvectors as columns, descending."""
    eigenvalues: Tensor
    """(p,)."""
    ranks: tuple[int, ...]
    """Of the range space, for each of the ratios."""


class TokenSpaces:
    """Second moments of all blocks, of one launch per width and batch."""

    def __init__(self, ratios: Sequence[float], ranks: Ranks) -> None:
        self.ratios, self.ranks = ratios, ranks
        self.names: list[str] = []
        """The blocks in the order they ran."""
        self.widths: list[int] = []
        self.moments: dict[int, StreamingCovariance] = {}
        self.unsettled: list[str] = []
        """Blocks whose space still changed at the last look."""
        self._before: dict[int, StreamingCovariance] = {}
        self._spaces: dict[str, Space] = {}

    def add(self, tokens: dict[str, Tensor]) -> None:
        """(B, N, p) of every block, in the order they ran."""
        widths = [x.shape[-1] for x in tokens.values()]
        if not self.moments:
            self.names, self.widths = list(tokens), widths
            for p in sorted(set(widths)):
                self.moments[p] = StreamingCovariance(p, widths.count(p), device=next(iter(tokens.values())).device)
        elif widths != self.widths or list(tokens) != self.names:
            now = dict(zip(tokens, widths, strict=True))
            changed = [name for name, p in zip(self.names, self.widths, strict=True) if now.get(name) != p]
            raise BlockError(
                f"the width of the tokens of {', '.join(map(repr, changed))} changed between batches"
                if changed
                else f"the blocks ran in another order in this batch: {list(tokens)}, before {self.names}"
            )
        for p, moment in self.moments.items():  # one launch for all blocks of a width
            moment.update([x for x in tokens.values() if x.shape[-1] == p])

    @property
    def num_samples(self) -> int:
        """Images that this process read."""
        return next(iter(self.moments.values())).num_samples if self.moments else 0

    def split(self) -> tuple[dict[str, Space], int]:
        """The spaces of all blocks in the order they ran, and the images that all ranks read."""
        spaces, samples = self._split(self._reduced())
        return spaces, samples

    def look(self) -> bool:
        """Whether the spaces are settled: compared with the last look, when half as many batches had been read.

        Both halves, what the last look had and what came since, have by themselves the rank that they have together, to
        1 % of the channels; and of the energy of the second half, the range space of the first keeps a share that
        differs by less than 1 % from what it kept of its own.
        """
        now = self._reduced()
        spaces, _ = self._split(now)
        self.unsettled = list(self.names)
        if self._before:
            new = {p: _since(now[p], self._before[p]) for p in now}
            rest, _ = self._split(new)
            rows = dict.fromkeys(now, 0)
            for name, p in zip(self.names, self.widths, strict=True):
                index, rows[p] = rows[p], rows[p] + 1
                last = self._spaces[name]
                ranks = zip(last.ranks, rest[name].ranks, spaces[name].ranks, strict=True)
                moved = max(max(three) - min(three) for three in ranks) / p
                basis = last.basis[:, : last.ranks[0]]
                kept = torch.stack(
                    [_energy(basis, half[p].accumulator[index]) for half in (self._before, new)]
                ).tolist()
                if moved < SETTLED and abs(kept[0] - kept[1]) < SETTLED:
                    self.unsettled.remove(name)
        self._before, self._spaces = now, spaces
        return not self.unsettled

    def _reduced(self) -> dict[int, StreamingCovariance]:
        """The sums over all ranks; copies."""
        found: dict[int, StreamingCovariance] = {}
        self.ranks.same({"the width of every block": dict(zip(self.names, self.widths, strict=True))})
        for p, moment in self.moments.items():
            found[p] = StreamingCovariance(p, len(moment.accumulator), device=moment.accumulator.device)
            found[p].merge_(moment)
            samples = torch.tensor(moment.num_samples, device=moment.accumulator.device)
            self.ranks.sum_([found[p].accumulator, samples])
            found[p].num_samples = int(samples)
        return found

    def _split(self, moments: dict[int, StreamingCovariance]) -> tuple[dict[str, Space], int]:
        spaces: dict[str, Space] = {}
        samples = 0
        for p, moment in moments.items():
            samples = moment.num_samples
            names = [name for name, width in zip(self.names, self.widths, strict=True) if width == p]
            finite = moment.accumulator.isfinite().flatten(1).all(1).tolist()
            if bad := [name for name, fine in zip(names, finite, strict=True) if not fine]:
                raise BlockError(f"the tokens of {', '.join(map(repr, bad))} hold NaN or Inf")
            if not samples:
                continue
            with self.ranks.signals.allowed():
                split = split_token_space(moment.compute(), self.ratios[0])
            ranks = torch.stack([torch.as_tensor(split.at(ratio).rank) for ratio in self.ratios], 1)
            # eigenvectors are unique only up to sign and rounding: all ranks use the first one's
            self.ranks.take_first_([split.basis, split.eigenvalues, ranks])
            rows = map(tuple, ranks.tolist())
            spaces |= dict(zip(names, map(Space, split.basis, split.eigenvalues, rows), strict=True))
        return {name: spaces[name] for name in self.names if name in spaces}, samples

    # --- kept in a file ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        sums = {p: (m.accumulator.cpu(), m.num_samples, m.num_tokens) for p, m in self.moments.items()}
        before = {p: (m.accumulator.cpu(), m.num_samples, m.num_tokens) for p, m in self._before.items()}
        return {"names": self.names, "widths": self.widths, "sums": sums, "before": before}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.names, self.widths = state["names"], state["widths"]
        self.moments, self._before = (
            {p: _moment(device, *sums) for p, sums in state[name].items()} for name in ("sums", "before")
        )

    def prepare(self) -> None:
        """What a look compares with, of sums that were loaded."""
        if self._before:
            self._spaces, _ = self._split(self._before)


def _moment(device: torch.device, accumulator: Tensor, samples: int, tokens: int) -> StreamingCovariance:
    moment = StreamingCovariance(accumulator.shape[-1], len(accumulator), device=device)
    moment.accumulator += accumulator.to(device)
    moment.num_samples, moment.num_tokens = samples, tokens
    return moment


def _since(now: StreamingCovariance, before: StreamingCovariance) -> StreamingCovariance:
    """What was added between the two."""
    found = StreamingCovariance(now.accumulator.shape[-1], len(now.accumulator), device=now.accumulator.device)
    found.merge_(now)
    found.accumulator -= before.accumulator
    found.num_samples -= before.num_samples
    found.num_tokens -= before.num_tokens
    return found


def _energy(basis: Tensor, moment: Tensor) -> Tensor:
    """The share of a second moment (p, p) that lies in a space (p, m)."""
    moment = moment.to(basis)
    return (basis * (moment @ basis)).sum() / moment.diagonal().sum()
