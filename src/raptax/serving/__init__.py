"""Running models for people: sampling and generation."""

from .generate import generate as generate
from .generate import generate_ids as generate_ids
from .generate import text_of as text_of
from .prompt import until as until
from .sampler import Sampler as Sampler
