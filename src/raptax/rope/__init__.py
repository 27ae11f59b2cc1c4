"""Rotary position embedding: frequencies, their scalings, and the rotation.

Su et al. 2021, arXiv:2104.09864. Frequency ``i`` of ``F`` turns by
``theta ** (-i / F)`` radians a position. Pairs of lanes are rotated together, in one of
two layouts that hold the same numbers in another order:

    half         lanes (i, i + F)      safetensors checkpoints of Hugging Face
    interleaved  lanes (2i, 2i + 1)    Llama GGUF files, the original paper

A scaling is a function of the frequencies; `RotaryEmbedding` is the value that layers
hold. Frequencies are worked out in float64 on the host, and angles are reduced to one
turn exactly (`turns`), so that cosines and sines are right at any distance.

Some embeddings know more than one table. `DynamicRotaryEmbedding` and
`LongRoPERotaryEmbedding` choose by the length of the sequence, `MultiAxisRotaryEmbedding`
turns some pairs by one position and others by another, for images and videos.
"""

from .by_length import DynamicRotaryEmbedding as DynamicRotaryEmbedding
from .by_length import LongRoPERotaryEmbedding as LongRoPERotaryEmbedding
from .embedding import Layout as Layout
from .embedding import RotaryEmbedding as RotaryEmbedding
from .embedding import rotate as rotate
from .multi_axis import MultiAxisRotaryEmbedding as MultiAxisRotaryEmbedding
from .scaling import Frequencies as Frequencies
from .scaling import deepseek_yarn_attention_scale as deepseek_yarn_attention_scale
from .scaling import deepseek_yarn_softmax_factor as deepseek_yarn_softmax_factor
from .scaling import frequencies as frequencies
from .scaling import linear_scaling as linear_scaling
from .scaling import llama3_scaling as llama3_scaling
from .scaling import longrope_attention_scale as longrope_attention_scale
from .scaling import yarn_attention_scale as yarn_attention_scale
from .scaling import yarn_scaling as yarn_scaling
