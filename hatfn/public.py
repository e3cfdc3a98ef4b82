"""The public names of hatfn, in groups."""

from hatfn import testing
from hatfn.builder import build
from hatfn.checks.capacity import HATWarning
from hatfn.engine import ranks
from hatfn.engine.torch_optim import from_torch
from hatfn.evaluation import metrics
from hatfn.evaluation.evaluate import Evaluation, evaluate
from hatfn.evaluation.task_inference import classify, infer_task, infer_task_by_gradient
from hatfn.evaluation.usage import memory, overlap, usage
from hatfn.learner import HAT
from hatfn.lifecycle.consolidate import Readiness, readiness
from hatfn.lifecycle.forget import Forgotten
from hatfn.lifecycle.grow import grow
from hatfn.lifecycle.similarity import similarity
from hatfn.method import protection, schedule
from hatfn.method.gates import gate, hard_gate
from hatfn.method.loss import cross_entropy
from hatfn.method.sparsity import sparsity
from hatfn.method.transforms import clamp_embeddings, compensate, protect
from hatfn.replicas import Replicas, replica, replicate, stack
from hatfn.state import HATState
from hatfn.storage.checkpoint import load, read_meta, save
from hatfn.storage.container import CheckpointError
from hatfn.subnet.compact import Subnet
from hatfn.subnet.export import adopt, export
from hatfn.tracing.graph import TraceError
from hatfn.tracing.manual import manual_wiring
from hatfn.tracing.select import select
from hatfn.tracing.trace import trace
from hatfn.training.types import Info
from hatfn.wiring import Wiring

__all__ = [
    # From a module to a learner.
    "trace",
    "manual_wiring",
    "select",
    "Wiring",
    "TraceError",
    "build",
    "from_torch",
    "HAT",
    "HATState",
    "Info",
    "HATWarning",
    # The life of tasks.
    "Readiness",
    "readiness",
    "similarity",
    "Forgotten",
    "grow",
    # Many seeds at once.
    "Replicas",
    "replicate",
    "replica",
    "stack",
    # How well it does, and who uses what.
    "Evaluation",
    "evaluate",
    "infer_task",
    "infer_task_by_gradient",
    "classify",
    "usage",
    "overlap",
    "memory",
    # Files, and modules without hatfn.
    "save",
    "load",
    "read_meta",
    "CheckpointError",
    "Subnet",
    "export",
    "adopt",
    # The method's own functions.
    "gate",
    "hard_gate",
    "cross_entropy",
    "sparsity",
    "protect",
    "compensate",
    "clamp_embeddings",
    # Namespaces.
    "schedule",
    "metrics",
    "protection",
    "ranks",
    "testing",
]
