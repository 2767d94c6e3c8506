"""How exactly a rotation multiplies: into how many float16 numbers, of 11 bits each, gradients and basis are split."""

from typing import NamedTuple

import torch

from ..launch import highest


class Precision(NamedTuple):
    """1 or 2 terms each, the second of what the first one rounds off."""

    grad_terms: int
    basis_terms: int

    @property
    def products(self) -> int:
        """Of float16 matrices per rotation: all terms with each other, but for the two lower ones."""
        return self.grad_terms + self.basis_terms - 1


ONE_PRODUCT = Precision(grad_terms=1, basis_terms=1)  # 11 bits each
TWO_PRODUCTS = Precision(grad_terms=1, basis_terms=2)  # 11 bits of the gradients, 22 of the basis
THREE_PRODUCTS = Precision(grad_terms=2, basis_terms=2)  # 22 bits each


def precision_of(grads: torch.dtype, basis: torch.dtype) -> Precision:
    """As few products as are exact; of float32 gradients, as exact as ``torch.get_float32_matmul_precision()``."""
    if grads == torch.float32:
        return THREE_PRODUCTS if highest() else ONE_PRODUCT
    return ONE_PRODUCT if grads == basis else TWO_PRODUCTS
