"""Running models for people: sampling and generation."""

from .loop import generate as generate
from .loop import generate_ids as generate_ids
from .loop import text_of as text_of
from .prompt import until as until
from .sampler import Sampler as Sampler
