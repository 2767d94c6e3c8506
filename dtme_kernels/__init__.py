"""Operations of token-space gradient conflicts and their resolution, for tensors: no model is known here."""

from .attention import expanded_attention
from .choice import implementation
from .conflicts import ConflictCounts, count_conflicts, projected_dots
from .covariance import token_covariance, token_covariance_
from .first_half import modulate_concat_attention
from .flops import register_formulas
from .modulation import modulate, modulate_layer_norm
from .registry import load_extension
from .streaming_covariance import StreamingCovariance
from .token_space import TokenSpace, split_token_space

__version__ = "0.1.0"

load_extension()
register_formulas()

__all__ = [
    "ConflictCounts",
    "StreamingCovariance",
    "TokenSpace",
    "__version__",
    "count_conflicts",
    "expanded_attention",
    "implementation",
    "modulate",
    "modulate_concat_attention",
    "modulate_layer_norm",
    "projected_dots",
    "split_token_space",
    "token_covariance",
    "token_covariance_",
]
