"""Attention kernels: functions of arrays. `registry` lists them, best first."""

from .blockwise import blockwise_attention as blockwise_attention
from .cpu.forward import native_attention as native_attention
from .cudnn import jax_nn_attention as jax_nn_attention
from .reference import reference_attention as reference_attention
from .registry import KERNELS as KERNELS
from .registry import Kernel as Kernel
