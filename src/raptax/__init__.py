"""raptax: an attention stack for JAX."""

from ._errors import Unsupported as Unsupported
from ._types import AttentionFn as AttentionFn
from ._types import MaskMod as MaskMod
from ._types import ScoreMod as ScoreMod
from .block_mask import BlockMask as BlockMask
from .block_mask import create_block_mask as create_block_mask
from .caches import KVCacheParams as KVCacheParams
from .caches import KVCacheStrategy as KVCacheStrategy
from .caches import PageAllocator as PageAllocator
from .caches import PagedKVCache as PagedKVCache
from .caches import SlotAllocator as SlotAllocator
from .caches import SlotKVCache as SlotKVCache
from .caches import TensorKVCache as TensorKVCache
from .dispatch import attention as attention
from .dispatch import explain as explain
from .dispatch import paged_attention as paged_attention
from .kernels import KERNELS as KERNELS
from .kernels.linear_attention import LinearState as LinearState
from .kernels.linear_attention import linear_attention as linear_attention
from .kernels.softmax import merge as merge
from .layers.attention import AttentionWithRope as AttentionWithRope
from .layers.attention import AttentionWithRopeNoOpaque as AttentionWithRopeNoOpaque
from .layers.interfaces import AttentionImpl as AttentionImpl
from .layers.interfaces import AttentionImplQKV as AttentionImplQKV
from .layers.interfaces import AttentionWithAlibi as AttentionWithAlibi
from .layers.interfaces import DistributedAttentionImpl as DistributedAttentionImpl
from .layers.interfaces import (
    VanillaAttentionWithCausalMask as VanillaAttentionWithCausalMask,
)
from .layers.linear import CodesLinear as CodesLinear
from .layers.linear import GGUFLinear as GGUFLinear
from .layers.linear import Linear as Linear
from .layers.norm import RMSNorm as RMSNorm
from .layers.packed import GGUFQAttentionWithRope as GGUFQAttentionWithRope
from .layers.packed import GPTQAttentionWithRope as GPTQAttentionWithRope
from .layers.parallel import (
    DataParallelAttentionWithRope as DataParallelAttentionWithRope,
)
from .layers.parallel import DistributedAttention as DistributedAttention
from .layers.parallel import (
    TensorParallelAttentionWithRope as TensorParallelAttentionWithRope,
)
from .layers.quantized import Float8Linear as Float8Linear
from .layers.quantized import GPTQLinear as GPTQLinear
from .layers.sharding import ShardingStrategy as ShardingStrategy
from .mods import ALiBi as ALiBi
from .mods import BidirectionalSpans as BidirectionalSpans
from .mods import BlockCausal as BlockCausal
from .mods import Causal as Causal
from .mods import Chunked as Chunked
from .mods import Dense as Dense
from .mods import DenseBias as DenseBias
from .mods import Documents as Documents
from .mods import KeyLengths as KeyLengths
from .mods import KeyRanges as KeyRanges
from .mods import LogN as LogN
from .mods import MaskedScore as MaskedScore
from .mods import Natten2D as Natten2D
from .mods import Offset as Offset
from .mods import PerHead as PerHead
from .mods import PrefixLM as PrefixLM
from .mods import QueryLengths as QueryLengths
from .mods import RelativeBias as RelativeBias
from .mods import Segments as Segments
from .mods import SinkWindow as SinkWindow
from .mods import SlidingWindow as SlidingWindow
from .mods import SoftCap as SoftCap
from .mods import Strided as Strided
from .mods import T5Bias as T5Bias
from .mods import Temperature as Temperature
from .mods import Tree as Tree
from .mods import Window as Window
from .mods import alibi_slopes as alibi_slopes
from .mods import and_masks as and_masks
from .mods import compose_score_mods as compose_score_mods
from .mods import documents_from_lengths as documents_from_lengths
from .mods import mask_mod_to_boolean_mask as mask_mod_to_boolean_mask
from .mods import or_masks as or_masks
from .mods import tree_from_parents as tree_from_parents
from .names import additive_bias_mod as additive_bias_mod
from .names import alibi_mod as alibi_mod
from .names import causal_mod as causal_mod
from .names import combine_masks as combine_masks
from .names import document_mask_mod as document_mask_mod
from .names import flash_attention as flash_attention
from .names import make_causal_mask as make_causal_mask
from .names import make_document_mask as make_document_mask
from .names import make_padding_mask as make_padding_mask
from .names import make_sliding_window_mask as make_sliding_window_mask
from .names import mask_mod_to_score_mod as mask_mod_to_score_mod
from .names import memory_efficient_attention as memory_efficient_attention
from .names import prefix_lm_mod as prefix_lm_mod
from .names import sliding_window_mod as sliding_window_mod
from .names import standard_attention as standard_attention
from .quant import Float8Config as Float8Config
from .quant import Float8InputScaleSpec as Float8InputScaleSpec
from .quant import Float8WeightScaleSpec as Float8WeightScaleSpec
from .quant import QuantizationConfig as QuantizationConfig
from .quant import float8_config_from_dict as float8_config_from_dict
from .ring import ring_attention as ring_attention
from .rope import DynamicRotaryEmbedding as DynamicRotaryEmbedding
from .rope import LongRoPERotaryEmbedding as LongRoPERotaryEmbedding
from .rope import MultiAxisRotaryEmbedding as MultiAxisRotaryEmbedding
from .rope import RotaryEmbedding as RotaryEmbedding
from .varlen import varlen_attention as varlen_attention
