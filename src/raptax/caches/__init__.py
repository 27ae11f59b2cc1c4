"""Where past keys and values live."""

from .paged import KVCacheParams as KVCacheParams
from .paged import PageAllocator as PageAllocator
from .paged import PagedKVCache as PagedKVCache
