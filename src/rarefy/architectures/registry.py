"""The architectures, and which of them a decoder is."""

from __future__ import annotations

from rarefy.architectures.architecture import Architecture
from rarefy.architectures.bloom import BLOOM
from rarefy.architectures.gemma2 import GEMMA2
from rarefy.architectures.gpt2 import GPT2, GPT_BIG_CODE
from rarefy.architectures.gptj import FALCON, GPTJ
from rarefy.architectures.llama import LLAMA, MISTRAL
from rarefy.architectures.mixtral import MIXTRAL
from rarefy.decoder.decoder_config import GPTConfig

# The first that fits is taken, so the more common come first.
ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    GEMMA2,
    GPTJ,
    FALCON,
    BLOOM,
    GPT2,
    GPT_BIG_CODE,
)


def nearest(config: GPTConfig) -> tuple[Architecture, list[str]]:
    """The architecture with the fewest objections to a decoder, and these; none where it computes the same.

    Example:
        >>> architecture, objections = nearest(GPTConfig(norm_type="rmsnorm"))
        >>> architecture.model_class, objections
        ('GPT2LMHeadModel', ['norm_type: rmsnorm'])
    """
    found = [(architecture, architecture.objections(config)) for architecture in ARCHITECTURES]

    def distance(one: tuple[Architecture, list[str]]) -> tuple[bool, bool, int]:
        # Who trains experts wants to read what is wrong with them, not that other models have none.
        return bool(one[1]), config.moe.is_on and one[0] is not MIXTRAL, len(one[1])

    return min(found, key=distance)
