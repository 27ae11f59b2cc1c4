"""Where past keys and values live."""

from .contiguous import ContiguousKVCache as ContiguousKVCache
from .contiguous import Partition as Partition
from .kv_quant import KVQuantization as KVQuantization
from .paged import PageAllocator as PageAllocator
from .paged import PagedKVCache as PagedKVCache
from .params import KVCacheParams as KVCacheParams
from .params import KVCacheStrategy as KVCacheStrategy
from .protocol import KVCache as KVCache
from .ring import RingKVCache as RingKVCache
from .slots import SlotAllocator as SlotAllocator
from .slots import SlotKVCache as SlotKVCache
from .slots import TensorKVCache as TensorKVCache
