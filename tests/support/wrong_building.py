"""Wrong calls of functions that make learners (trace, build, ...), and of the functions of a step."""

from __future__ import annotations

import math

import torch
import torchopt
from nets import learner, mlp
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from wrong import IMAGES, MAPS, MODULE, X, wrong

import hatfn
from hatfn.models import MLP


class Tied(nn.Module):
    """A head that shares its weight with another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x))


class Reading(nn.Module):
    """A module that reads a number from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.layer.bias.sum().item()


class Shifted(nn.Module):
    """A module with a constant that the trace reads."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.full((8,), shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) + self.shift)


class Counting(nn.Module):
    """A module with a parameter of integers, which cannot be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.count = nn.Parameter(torch.tensor([1]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * self.count


class Branching(nn.Module):
    """A module that branches on a value, which export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Unknown(nn.Module):
    """A module with an operator that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).logcumsumexp(1)


def alone(module: nn.Module, x: torch.Tensor = X, **trace: object) -> dict[str, object]:
    """A module and its wiring, for build()."""
    return {"wiring": hatfn.trace(module, x, **trace)}


CONV, PLAIN = nn.Conv2d(1, 4, 3), nn.Linear(5, 3)
SHORT = {"a": torch.rand(3)}
CASES = [
    # trace
    wrong("trace", "module", None, TypeError, "trace", "NoneType", "torch.zeros"),
    wrong("trace", "module", Branching(), hatfn.TraceError, "trace", "Branching", "export"),
    wrong("trace", "module", Reading(), hatfn.TraceError, "trace", "item", "shapes and constants"),
    wrong("trace", "module", nn.Embedding(5, 8, max_norm=0.5), hatfn.TraceError,
          "trace", "changes its parameter weight", "max_norm", x=torch.tensor([[1, 2]])),
    wrong("trace", "module", Unknown(), hatfn.TraceError, "logcumsumexp", "strict", strict=True),
    wrong("trace", "x", (1, 5), TypeError, "trace", "tuple", "torch.zeros"),
    wrong("trace", "x", (X, 5), TypeError, "trace", "1 is a int", "torch.as_tensor"),
    wrong("trace", "unbatched", ["edges"], ValueError, "trace", "'edges'", "no input", "Expected some of x"),
    wrong("trace", "unbatched", ["x"], ValueError, "trace", "x (1, 5)", "lead with the samples"),
    wrong("trace", "output_gate", "no", TypeError, "trace", "output_gate='no'", "True, False or None"),
    wrong("select", "wiring", MODULE, TypeError, "select", "MLP", "hatfn.trace(module, x)"),
    wrong("select", "groups", ["conv"], ValueError, "select", "'conv'", "'hidden.0'"),
    wrong("manual_wiring", "unbatched", ["edges"], ValueError, "manual_wiring", "'edges'", "no input"),
    wrong("trace", "x", torch.zeros(1, 4), hatfn.TraceError, "trace", "MLP", "(2, 4)"),
    wrong("trace", "head", "fc", ValueError, "trace", "head='fc'", "MLP", "head"),
    wrong("trace", "head", "1", ValueError, "trace", "head='1'", module=mlp()),
    wrong("trace", "head", 4, TypeError, "trace", "head=4", "names of layers"),
    wrong("trace", "head", "0", ValueError, "trace", "head='0'", module=nn.Sequential(weight_norm(nn.Linear(5, 3)))),
    wrong("trace", "head", "head", ValueError, "trace", "head.weight", "used elsewhere", module=Tied(), x=X[:, :4]),
    # manual_wiring
    wrong("manual_wiring", "module", None, TypeError, "manual_wiring", "NoneType", "nn.Module"),
    wrong("manual_wiring", "x", (2, 5), TypeError, "manual_wiring", "(2, 5)", "torch.zeros(2"),
    wrong("manual_wiring", "x", X[:, :3], ValueError, "manual_wiring", "MLP", "(8, 3)"),
    wrong("manual_wiring", "layers", ["hidden.0"], TypeError, "manual_wiring", "list", "dict"),
    wrong("manual_wiring", "layers", {"hidden.9": "a"}, ValueError, "manual_wiring", "'hidden.9'", "'hidden.1'"),
    wrong("manual_wiring", "layers", {"hidden.0": ("a", "b")}, ValueError, "manual_wiring", "'b'", "no layer produces"),
    wrong("manual_wiring", "layers", {"dropout": "a"}, ValueError, "manual_wiring", "Dropout", "no weight"),
    wrong("manual_wiring", "layers", {"hidden.0": ("a", None), "head": ("a", None)}, ValueError, "'a'", "as many"),
    wrong("manual_wiring", "head", "fc", ValueError, "head='fc'", "MLP", "head"),
    # build
    wrong("build", "module", None, TypeError, "build", "NoneType", "nn.Module"),
    wrong("build", "module", MLP(5, 3, width=8), ValueError, "build", "another module", "head.weight", "(3, 8)", "(3, 16)"),
    wrong("build", "module", Shifted(1.0), ValueError, "build", "buffer shift", "Trace the module as it is now",
          **alone(Shifted(0.0), head="head")),
    wrong("build", "module", Counting(), TypeError, "build", "count", "int64", "buffer", **alone(Counting(), head="head")),
    wrong("build", "module", CONV, ValueError, "(B, 4, 6, 6)", "(B, D)", "head='fc'", **alone(CONV, IMAGES)),
    wrong("build", "wiring", X, TypeError, "build", "Tensor", "hatfn.trace(module, x)"),
    wrong("build", "wiring", hatfn.trace(MODULE, X, head=()), ValueError, "build", "head='head'"),
    wrong("build", "classes", None, ValueError, "build", "classes=None", "head.weight", "head=False"),
    wrong("build", "classes", 10, TypeError, "build", "classes=10", "[2, 2, 2]"),
    wrong("build", "classes", "22", TypeError, "build", "classes='22'", "[2, 2, 2]"),
    wrong("build", "classes", [2, 0], ValueError, "build", "[2, 0]", "positive"),
    wrong("build", "classes", [2.5, 2], TypeError, "build", "classes=2.5", "int"),
    wrong("build", "classes", [], ValueError, "build", "classes=[]"),
    wrong("build", "optimizer", torch.optim.Adam(MODULE.parameters()), TypeError,
          "build", "Adam", "(init, update)", "hatfn.from_torch(torch.optim.Adam, lr=1e-3)"),
    wrong("build", "optimizer", torchopt.Adam(MODULE.parameters(), 1e-3), TypeError, "torchopt.adam(1e-3)"),
    wrong("build", "optimizer", "adam", TypeError, "build", "str", "torchopt.adam(1e-3)"),
    wrong("build", "optimizer", torchopt.sgd(0.1, momentum=0.9, dampening=0.5), ValueError, "build", "dampening"),
    wrong("build", "optimizer", torchopt.radam(1e-3), TypeError, "build", "number", "radam"),
    wrong("from_torch", "kind", torchopt.adam(1e-3), TypeError, "from_torch", "kind=", "torch.optim.Adam, lr=1e-3"),
    wrong("from_torch", "kind", torch.optim.SGD(MODULE.parameters()), TypeError, "from_torch", "class of torch.optim"),
    wrong("from_torch", "kind", torch.optim.LBFGS, TypeError, "from_torch", "LBFGS", "closure"),
    wrong("from_torch", "settings", {"lr": -1.0}, ValueError, "learning rate", "-1.0"),
    wrong("build", "num_tasks", 3, ValueError, "num_tasks=3", "no num_tasks"),
    wrong("build", "num_tasks", 0, ValueError, "build", "num_tasks=0", "at least 1", classes=None, module=PLAIN, **alone(PLAIN)),
    wrong("build", "num_tasks", 1.5, TypeError, "build", "num_tasks=1.5", "int", classes=None, module=PLAIN, **alone(PLAIN)),
    wrong("build", "loss", "mse", TypeError, "build", "loss='mse'", "function"),
    wrong("build", "regularizer", None, TypeError, "build", "regularizer=None", "hatfn.sparsity"),
    wrong("build", "gate", "sigmoid", TypeError, "build", "gate='sigmoid'", "torch.sigmoid"),
    wrong("build", "s_max", 0.0, ValueError, "build", "s_max=0.0", "above 1"),
    wrong("build", "s_max", "large", TypeError, "build", "s_max='large'", "number"),
    wrong("build", "sparsity", -1.0, ValueError, "build", "sparsity=-1.0", "at least 0"),
    wrong("build", "sparsity", [1.0], ValueError, "build", "sparsity has 1", "2 tasks"),
    wrong("build", "sparsity", ["a", "b"], TypeError, "build", "sparsity='a'", "number"),
    wrong("build", "sparsity", None, TypeError, "build", "sparsity=None", "number"),
    wrong("build", "quota", 1.5, ValueError, "build", "quota=1.5", "from 0 to 1"),
    wrong("build", "init", "zeros", ValueError, "build", "init='zeros'", "normal"),
    wrong("build", "protection", "none", ValueError, "build", "protection='none'", "exact"),
    wrong("build", "compensation", -1.0, ValueError, "build", "compensation=-1.0", "above 0"),
    wrong("build", "compensation", "max", TypeError, "build", "compensation='max'", "number"),
    wrong("build", "max_norm", 0.0, ValueError, "build", "max_norm=0.0", "None"),
    wrong("build", "precision", torch.float64, ValueError, "build", "torch.float64", "module.double()"),
    wrong("build", "accumulate", 0, ValueError, "build", "accumulate=0", "at least 1"),
    wrong("build", "accumulate", 1.5, TypeError, "build", "accumulate=1.5", "an int"),
    wrong("build", "compile", True, ValueError, "build", "compile=True", "update"),
    wrong("build", "grad_checkpointing", 1, TypeError, "build", "grad_checkpointing is a int", "True"),
    wrong("build", "grad_checkpointing", True, ValueError, "build", "MLP does not offer it", "accumulate="),
    wrong("build", "ranks", 2, TypeError, "build", "ranks is a int", "hatfn.ranks.joined()"),
    wrong("build", "clamp", math.inf, ValueError, "build", "clamp=inf", "finite"),
    wrong("build", "clamp", None, TypeError, "build", "clamp=None", "number"),
    # replicate, adopt
    wrong("replicate", "hat", MODULE, TypeError, "replicate", "MLP", "hatfn.build"),
    wrong("replicate", "seeds", 3, TypeError, "replicate", "seeds=3", "range(8)"),
    wrong("replicate", "seeds", [], ValueError, "replicate", "no seeds", "range(8)"),
    wrong("replicate", "seeds", [0.5], TypeError, "replicate", "seed=0.5", "int"),
    wrong("replicate", "seeds", [0, -1], ValueError, "replicate", "seed=-1", "at least 0"),
    wrong("replicate", "hyper", {"momentum": 1.0}, ValueError, "replicate", "momentum is no setting", "lr"),
    wrong("replicate", "hyper", {"lr": -1.0}, ValueError, "replicate", "lr=-1.0", "at least 0"),
    wrong("replicate", "hyper", {"lr": "a"}, TypeError, "replicate", "lr='a'", "number"),
    wrong("replicate", "hyper", {"lr": [1.0, 1.0, 1.0]}, ValueError, "replicate", "3 values of lr", "2 replicas"),
    wrong("adopt", "hat", MODULE, TypeError, "adopt", "MLP", "hatfn.build"),
    wrong("adopt", "module", MODULE.state_dict(), TypeError, "adopt", "OrderedDict", "nn.Module", "hatfn.adopt(hat, "),
    wrong("adopt", "module", mlp(), ValueError, "adopt", "another architecture", "0.bias", "module (16,)", "learner None"),
    wrong("adopt", "module", MLP(5, 3, width=8), ValueError,
          "adopt", "head.weight", "module ('classes', 8)", "learner ('classes', 16)", "that was traced"),
    wrong("adopt", "module", Shifted(1.0), ValueError, "adopt", "buffer shift", "Trace the module", hat=learner(Shifted(0.0), X)),
    # grow
    wrong("grow", "hat", MODULE, TypeError, "grow", "MLP", "hatfn.build"),
    wrong("grow", "state", None, TypeError, "grow", "NoneType", "hat.init(seed=0)"),
    wrong("grow", "loss", [nn.functional.mse_loss], ValueError, "grow", "1 functions for 2 tasks", "one for each", classes=[2, 2]),
    wrong("grow", "loss", nn.functional.mse_loss, TypeError, "grow", "loss", "function for each new task"),
    wrong("grow", "classes", None, ValueError, "grow", "classes=[3, 2, 3]", "classes=[2]", num_tasks=2),
    wrong("grow", "classes", [2], ValueError, "grow", "no classes", "num_tasks=1", hat=MAPS, state=MAPS.init(0)),
    wrong("grow", "classes", [], ValueError, "grow", "classes=[]"),
    wrong("grow", "classes", 2, TypeError, "grow", "classes=2", "[2, 2, 2]"),
    wrong("grow", "num_tasks", 3, ValueError, "grow", "num_tasks=3", "no num_tasks"),
    wrong("grow", "num_tasks", 0, ValueError, "grow", "num_tasks=0", "at least 1", hat=MAPS, state=MAPS.init(0), classes=None),
    # the pure functions of a step
    wrong("gate", "scale", -1.0, ValueError, "gate", "scale=-1.0", "at least 0", "invert"),
    wrong("gate", "scale", torch.tensor([1.0, -1.0]), ValueError, "gate", "scale=-1.0", "invert", embedding=torch.ones(2)),
    wrong("gate", "scale", math.nan, ValueError, "gate", "scale=nan"),
    wrong("compensate", "gradients", torch.rand(4), TypeError, "compensate", "Tensor", "dict"),
    wrong("compensate", "embeddings", {}, ValueError, "compensate", "embeddings['a']", "None", "(4,)"),
    wrong("compensate", "embeddings", SHORT, ValueError, "compensate", "embeddings['a']", "(3,)", "(4,)"),
    wrong("compensate", "scale", 0.0, ValueError, "compensate", "scale=0.0", "above 0"),
    wrong("compensate", "scale", -1.0, ValueError, "compensate", "scale=-1.0", "above 0"),
    wrong("compensate", "s_max", -400.0, ValueError, "compensate", "s_max=-400.0", "above 0"),
    wrong("compensate", "factor", math.nan, ValueError, "compensate", "factor=nan", "finite"),
    wrong("protect", "tree", torch.rand(4), TypeError, "protect", "Tensor", "dict"),
    wrong("protect", "protection", {}, ValueError, "protect", "protection['a']", "None", "(4,)"),
    wrong("protect", "protection", SHORT, ValueError, "protect", "protection['a']", "(3,)", "(4,)"),
    wrong("clamp_embeddings", "embeddings", torch.rand(4), TypeError, "clamp_embeddings", "Tensor", "dict"),
    wrong("clamp_embeddings", "limit", -6.0, ValueError, "clamp_embeddings", "limit=-6.0", "above 0"),
    wrong("sparsity", "gates", torch.rand(4), TypeError, "sparsity", "Tensor", "dict"),
    wrong("sparsity", "cumulative", SHORT, ValueError, "sparsity", "cumulative['a']", "(3,)", "(4,)"),
    wrong("sparsity", "quota", 1.5, ValueError, "sparsity", "quota=1.5", "from 0 to 1"),
    wrong("sparsity", "over", "units", ValueError, "over='units'", "groups"),
    # schedules
    *(wrong(f"schedule.{name}", "s_max", 0.5, ValueError, "schedule", "s_max=0.5", "above 1")
      for name in ("linear", "exponential", "cosine", "constant")),
    wrong("schedule.linear", "s_max", "400", TypeError, "schedule", "s_max='400'", "number"),
    wrong("schedule.exponential", "r", 2.0, ValueError, "r=2.0", "(0, 1]"),
    wrong("schedule.cosine", "s_min", 500.0, ValueError, "s_min=500.0", "s_max=400.0"),
    wrong("schedule.cosine", "s_min", "low", TypeError, "s_min='low'", "number"),
    *(wrong(name, "progress", value, ValueError, "schedule", f"progress={value}", "from 0 to 1", "step / steps")
      for name in ("linear's", "exponential's", "cosine's") for value in (-0.5, 2.0)),
]  # fmt: skip
