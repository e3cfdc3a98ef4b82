"""hatfn: continual learning with hard attention to the task, in the functional style."""

from hatfn import schedule
from hatfn.build import build
from hatfn.checkpoint import CheckpointError, load, save
from hatfn.checks import HATWarning
from hatfn.compact import Subnet
from hatfn.evaluate import usage
from hatfn.gates import gate, hard_gate
from hatfn.learner import HAT, Info
from hatfn.manual import manual_wiring
from hatfn.regularizer import sparsity
from hatfn.state import HATState
from hatfn.tracing import TraceError, trace
from hatfn.transforms import clamp_embeddings, compensate, protect
from hatfn.wiring import Wiring

__all__ = [
    "HAT",
    "CheckpointError",
    "HATState",
    "HATWarning",
    "Info",
    "Subnet",
    "TraceError",
    "Wiring",
    "build",
    "clamp_embeddings",
    "compensate",
    "gate",
    "hard_gate",
    "load",
    "manual_wiring",
    "protect",
    "save",
    "schedule",
    "sparsity",
    "trace",
    "usage",
]
