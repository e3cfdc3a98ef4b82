"""hatfn: continual learning with hard attention to the task, in the functional style."""

from hatfn import schedule
from hatfn.build import build
from hatfn.calibration import Readiness, readiness
from hatfn.checkpoint import load, save
from hatfn.checks import HATWarning
from hatfn.compact import Subnet
from hatfn.container import CheckpointError
from hatfn.evaluation import Evaluation, evaluate
from hatfn.export import adopt, export
from hatfn.gates import gate, hard_gate
from hatfn.inference import classify, infer_task, infer_task_by_gradient
from hatfn.learner import HAT
from hatfn.lifecycle import Forgotten, grow
from hatfn.manual import manual_wiring
from hatfn.metrics import memory, overlap, usage
from hatfn.regularizer import sparsity
from hatfn.replicas import Replicas, replicate
from hatfn.state import HATState
from hatfn.step import Info
from hatfn.torch_optim import from_torch
from hatfn.tracing import TraceError, trace
from hatfn.transfer import similarity
from hatfn.transforms import clamp_embeddings, compensate, protect
from hatfn.wiring import Wiring

__all__ = [
    "HAT",
    "CheckpointError",
    "Evaluation",
    "Forgotten",
    "HATState",
    "HATWarning",
    "Info",
    "Readiness",
    "Replicas",
    "Subnet",
    "TraceError",
    "Wiring",
    "adopt",
    "build",
    "clamp_embeddings",
    "classify",
    "compensate",
    "evaluate",
    "export",
    "from_torch",
    "gate",
    "grow",
    "hard_gate",
    "infer_task",
    "infer_task_by_gradient",
    "load",
    "manual_wiring",
    "memory",
    "overlap",
    "protect",
    "readiness",
    "replicate",
    "save",
    "schedule",
    "similarity",
    "sparsity",
    "trace",
    "usage",
]
