"""Where past keys and values live."""

from .base import KVCache as KVCache
from .config import KVCacheParams as KVCacheParams
from .config import KVCacheStrategy as KVCacheStrategy
from .contiguous import ContiguousKVCache as ContiguousKVCache
from .contiguous import Partition as Partition
from .paged import PageAllocator as PageAllocator
from .paged import PagedKVCache as PagedKVCache
from .quantization import KVQuantization as KVQuantization
from .sliding_window import RingKVCache as RingKVCache
from .slots import SlotAllocator as SlotAllocator
from .slots import SlotKVCache as SlotKVCache
from .slots import TensorKVCache as TensorKVCache
