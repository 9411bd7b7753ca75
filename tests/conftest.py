import os
import tempfile
from pathlib import Path

import torch

OFFLINE = str(Path(__file__).parent / "offline")


def pytest_configure(config):
    """Chapters run in kernels of their own: keep those off the network, and quiet about it."""
    config.outbound_log = Path(tempfile.mkstemp(suffix=".outbound")[1])
    os.environ["OUTBOUND_LOG"] = str(config.outbound_log)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [OFFLINE, os.environ.get("PYTHONPATH")]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)  # unit tests are small; chapters run in kernels of their own, with all cores


def pytest_collection_modifyitems(items):
    """A finished cell has 5 s to hand in its last output, too few on a machine that is busy with other things."""
    for item in items:
        if hasattr(item.parent, "output_timeout"):
            item.parent.output_timeout = 60


def pytest_sessionfinish(session):
    """A library may swallow the refusal, so the attempts themselves fail the run."""
    if attempts := session.config.outbound_log.read_text():
        session.config.get_terminal_writer().line(f"\nA chapter tried to leave this machine:\n{attempts}", red=True)
        session.exitstatus = 1


def pytest_unconfigure(config):
    config.outbound_log.unlink(missing_ok=True)
