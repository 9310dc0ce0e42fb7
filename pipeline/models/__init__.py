"""Networks: one file an architecture. A new one is a file, a `MODELS.register` and a line here."""

from pipeline.models import unet
from pipeline.models.source import MODELS, Architecture

__all__ = ["MODELS", "Architecture", "unet"]
