"""What weights are made of: bytes to numbers, one module per format."""

from .float8 import Float8Config as Float8Config
from .float8 import Float8InputScaleSpec as Float8InputScaleSpec
from .float8 import Float8WeightScaleSpec as Float8WeightScaleSpec
from .float8_config import float8_config_from_dict as float8_config_from_dict
from .gptq import QuantizationConfig as QuantizationConfig
