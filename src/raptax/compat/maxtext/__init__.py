"""MaxText's attention page, under its names, on raptax's kernels and caches."""

from .attention import Attention as Attention
from .dense import DenseGeneral as DenseGeneral
from .dense import L2Norm as L2Norm
from .dense import nd_dense_init as nd_dense_init
from .kvcache import KVQuant as KVQuant
from .linen import attention_as_linen as attention_as_linen
from .linen import l2_norm_as_linen as l2_norm_as_linen
from .linen import mla_as_linen as mla_as_linen
from .mla import MLA as MLA
from .options import AttentionOptions as AttentionOptions
from .options import AttentionType as AttentionType
from .quantize import QwixQuantization as QwixQuantization
from .serving import ragged_paged_attention as ragged_paged_attention
