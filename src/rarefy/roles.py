"""What a parameter is to its module: a matrix or a kernel that multiplies activations, or something else.

Only the former becomes sparse without being asked for. A module of torch's says it by its class; of any other, the
name and the shape of the parameter have to say so, and in doubt it stays dense.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *_TRANSPOSED)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# Words, between underscores, in names of weights that multiply activations.
_PRODUCT = re.compile(
    r"(^|_)(weights?|kernels?|proj(ections?)?|matrix|filters?|linear|fc|qkv|experts?|w|w[a-z]{1,2})\d*(_|$)"
)
# Words that outweigh those: a `pos_weight` or a `bias_proj` is added or looked up.
_OTHER = re.compile(
    r"(^|_)(tokens?|pos|positions?|positional|embeds?|embeddings?|bias|biases|scales?|gains?|gamma|beta|temperature|"
    r"codebooks?|norm|table)\d*(_|$)"
)
# Words that do so only where nothing says product: `query_proj` and `state_weight` are matrices.
_ALONE = re.compile(
    r"(^|_)(quer(y|ies)|latents?|prompts?|cent(er|re|roid)s?|prototypes?|alpha|log|states?|mean|std|masks?)\d*(_|$)"
)
_ENDS_AS_PRODUCT = re.compile(r"_(kernel|proj|projection)$")
_NAMED_PRODUCT = re.compile(r"_weights?$")
_OTHER_CLASSES = re.compile(r"norm|embed|position|scale|quantiz|codebook|token", re.IGNORECASE)
# They divide by one number, or multiply with a mask.
_KEEPS_ZEROS = ("_SpectralNorm", "FakeSparsity")


@dataclass(frozen=True)
class Axes:
    """How a module reads the first two dimensions of its weight.

    Args:
        transposed: the weight is [in, out, …], as of a transposed convolution, instead of [out, in, …].
        groups: of a convolution; each sees its own share of the inputs.
        unknown: why it cannot be told which dimension is which; empty where it can.

    Example:
        >>> Axes().transposed
        False
    """

    transposed: bool = False
    groups: int = 1
    unknown: str = ""


OUT_IN = Axes()


@dataclass(frozen=True)
class Place:
    """One module attribute that holds a parameter.

    Args:
        module: holds it.
        leaf: name of the attribute.
        owner: the module whose weight is computed from it, where a parametrization does so.
        target: name of that weight in `owner`.
    """

    module: nn.Module
    leaf: str
    owner: nn.Module | None = None
    target: str = ""


def why_dense(place: Place, shape: Sequence[int]) -> str:
    """Why a parameter of two or more dimensions is no weight of a matrix product or convolution; empty if it is one.

    Args:
        place: where it is.
        shape: of the parameter.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        >>> why_dense(Place(attention, "in_proj_weight"), (12, 4)), why_dense(Place(attention, "bias_k"), (1, 1, 4))
        ('', 'bias_k is no weight of a MultiheadAttention')
    """
    module, leaf = _asked_for(place)
    if leaf is None:
        return f"a part of the parametrization of {place.target}"
    known = _known_leaf(module, leaf)
    if known is None:
        return _guess(module, leaf, shape)
    if not known:
        return f"{leaf} is no weight of a {kind_of(module)}"
    return parametrization_problem(place)


def axes_of(place: Place, dimensions: int) -> Axes:
    """Which dimension of a weight is which.

    Args:
        place: where it is.
        dimensions: how many the weight has.

    Example:
        >>> axes_of(Place(nn.ConvTranspose1d(4, 2, 3), "weight"), 3).transposed
        True
    """
    # A bias has outputs alone, however its module reads the weight beside it.
    if dimensions < 2:
        return OUT_IN
    module, _ = _asked_for(place)
    if isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
        return Axes(isinstance(module, _TRANSPOSED), module.groups)
    if _is_transposed_linear(module):
        return Axes(transposed=True)
    # Experts of transformers are [expert, …] with in and out in either order; of others, 3-D counts as [out, in, …].
    if dimensions == 3 and type(module).__module__.startswith("transformers."):
        return Axes(unknown=f"it is not known which dimension of a {kind_of(module)}'s weight is the output")
    return Axes()


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is Hugging Face's linear layer with a weight [in, out]."""
    # By name: Transformers need not be there, and takes long to import where it is.
    kinds = [kind for kind in type(module).__mro__ if kind.__name__ in ("Conv1D", "SparseConv1D")]
    return any(kind.__module__.partition(".")[0] in ("transformers", "rarefy") for kind in kinds)


def parametrization_problem(place: Place) -> str:
    """Why zeros in a parameter would not be zeros of the weight that is computed from it; empty where they are.

    Example:
        >>> layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
        >>> parametrization_problem(Place(layer.parametrizations.weight, "original", layer, "weight"))
        'its parametrization _Orthogonal does not keep zeros'
    """
    chain = place.module
    if not isinstance(chain, parametrize.ParametrizationList):
        return ""
    steps = list(chain)
    if all(type(step).__name__ in _KEEPS_ZEROS for step in steps):
        return ""
    # A weight that is computed from several tensors has its zeros in none of them alone.
    if not isinstance(getattr(chain, "original", None), Tensor) or _loses_zeros(chain):
        names = ", ".join(type(step).__name__ for step in steps)
        return f"its parametrization {names} does not keep zeros"
    return ""


@torch.no_grad()
def _loses_zeros(chain: nn.Module) -> bool:
    """Tried on a copy with zeros planted in it."""
    # In training a parametrization may change its own buffers, or draw random numbers.
    copied = copy.deepcopy(chain).eval()
    original = copied.get_parameter("original")
    if original.is_meta:
        return True
    planted = torch.arange(original.numel(), device=original.device).view(original.shape) % 3 == 1
    # A generator of its own: asking must not change what the model draws next.
    original.normal_(generator=torch.Generator(original.device).manual_seed(0)).masked_fill_(planted, 0)
    weight = copied()
    # A weight that is zero everywhere says nothing about the planted ones.
    return weight.shape != original.shape or bool(weight[planted].any()) or not bool(weight.any())


def _asked_for(place: Place) -> tuple[nn.Module, str | None]:
    """The module and the name of the weight that a parameter stands for; None for a part that is not the weight."""
    if place.owner is None:
        return place.module, place.leaf
    # Weight norm divides its direction (original1) by the norm of each row, and that of a row without connections is 0.
    return place.owner, place.target if place.leaf == "original" else None


def _known_leaf(module: nn.Module, leaf: str) -> bool | None:
    """Whether a module of a known class multiplies with this parameter; None for a class that is not known."""
    # torch.nn.utils.prune and old spectral norm keep it as weight_orig, old weight norm as weight_g and weight_v.
    plain = leaf.removesuffix("_orig")
    if leaf.endswith(("_g", "_v")):
        return False if _known_leaf(module, leaf[:-2]) else None
    if isinstance(module, _LINEAR) or _is_transposed_linear(module):
        return True if plain == "weight" else None
    if isinstance(module, nn.MultiheadAttention):
        return plain in _PACKED
    if isinstance(module, _RECURRENT):
        return plain.startswith("weight_")
    return None


def _guess(module: nn.Module, leaf: str, shape: Sequence[int]) -> str:
    """What name and shape say of a parameter whose module is of no known class."""
    name = re.sub(r"([a-z])([A-Z])", r"\1_\2", leaf).lower()
    # A class token [1, 1, d] is a vector, however many dimensions it has.
    is_matrix = len(shape) == 2 or sum(size > 1 for size in shape) > 1
    if not (is_matrix or _ENDS_AS_PRODUCT.search(f"_{name}")):
        return f"{leaf} of a {kind_of(module)} is a vector"
    is_alone = _ALONE.search(name) and not (_ENDS_AS_PRODUCT.search(name) or _NAMED_PRODUCT.search(name))
    if is_alone or _OTHER.search(name) or _OTHER_CLASSES.search(type(module).__name__):
        return f"{leaf} of a {kind_of(module)} multiplies no activations by its name"
    if not _PRODUCT.search(name):
        return f"{leaf} of a {kind_of(module)} is not known to multiply activations; name it in param_filter"
    return ""


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, as it was before a parametrization or `fully_shard` made another of it.

    Example:
        >>> kind_of(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)))
        'Linear'
    """
    return type(module).__name__.removeprefix("FSDP").removeprefix("Parametrized")
