import os
from pathlib import Path

OFFLINE = str(Path(__file__).parent / "offline")


def pytest_configure(config):
    """Chapters run in kernels of their own: keep those off the network, and quiet about it."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [OFFLINE, os.environ.get("PYTHONPATH")]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
