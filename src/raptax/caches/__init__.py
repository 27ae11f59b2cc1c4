"""Where past keys and values live."""

from .paged import PageAllocator as PageAllocator
from .paged import PagedKVCache as PagedKVCache
from .params import KVCacheParams as KVCacheParams
from .params import KVCacheStrategy as KVCacheStrategy
from .protocol import KVCache as KVCache
from .slots import SlotAllocator as SlotAllocator
from .slots import SlotKVCache as SlotKVCache
from .slots import TensorKVCache as TensorKVCache
