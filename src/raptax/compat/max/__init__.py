"""MAX's attention page, under its names, on raptax's layers and caches."""

from .attention import AttentionWithRopeNoOpaque as AttentionWithRopeNoOpaque
from .attention import DataParallelAttentionWithRope as DataParallelAttentionWithRope
from .attention import (
    TensorParallelAttentionWithRope as TensorParallelAttentionWithRope,
)
from .call import call_as_max as call_as_max
from .interfaces import AttentionImpl as AttentionImpl
from .interfaces import AttentionImplQKV as AttentionImplQKV
from .interfaces import AttentionWithAlibi as AttentionWithAlibi
from .interfaces import DistributedAttentionImpl as DistributedAttentionImpl
from .interfaces import VanillaAttentionWithCausalMask as VanillaAttentionWithCausalMask
from .quantized_attention import GGUFQAttentionWithRope as GGUFQAttentionWithRope
from .quantized_attention import GPTQAttentionWithRope as GPTQAttentionWithRope
