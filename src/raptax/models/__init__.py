"""Real models: a decoder, its tokenizer, and the files both come from."""

from .decoder import Decoder as Decoder
from .decoder import DecoderConfig as DecoderConfig
from .hub import MODELS as MODELS
from .hub import fetch as fetch
from .language_model import LanguageModel as LanguageModel
from .language_model import load as load
