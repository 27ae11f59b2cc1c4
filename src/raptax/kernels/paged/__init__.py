"""Attention over keys and values that lie in pages; see `attention`."""

from .attention import append_and_attend as append_and_attend
from .attention import attend as attend
from .problem import Pool as Pool
from .problem import places as places
