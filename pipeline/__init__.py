"""reseg: re-segment a medical-image archive every night and retrain its models at scale.

The names below load on first use, so that `import pipeline` pulls in neither torch nor ray.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Predictor": "pipeline.inference",
    "load_bundle": "pipeline.bundle",
    "make_plan": "pipeline.planning",
    "open_night": "pipeline.results",
    "run_evaluate": "pipeline.flows.evaluate",
    "run_segment": "pipeline.flows.segment",
    "run_train": "pipeline.flows.train",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
