"""Real models: a decoder, its tokenizer, and the files both come from."""

from .decoder import Decoder as Decoder
from .decoder import DecoderConfig as DecoderConfig
from .language_model import LanguageModel as LanguageModel
from .language_model import load as load
from .published import MODELS as MODELS
from .published import fetch as fetch
