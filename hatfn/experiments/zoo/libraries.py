"""The libraries of the zoo: what to install, and the rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

from hatfn.experiments.rows import Entry, Page, Sample, examine, sweep
from hatfn.experiments.zoo import (
    graphs,
    huggingface,
    images,
    signals,
    transformers_of_images,
    volumes,
)

Models = Mapping[str, Callable[[], Sample]]
"""How to build each model of a library, by its name."""


class Library(NamedTuple):
    """A library of models.

    Attributes:
        package: what Python imports.
        models: its models; this imports nothing of the library, building one does.
        project: its name for pip, if that is another one.
    """

    package: str
    models: Models
    project: str = ""

    @property
    def pip(self) -> str:
        """Its name for pip."""
        return self.project or self.package


LIBRARIES = {
    "torchvision": Library("torchvision", images.torchvision()),
    "pytorchcv": Library("pytorchcv", images.pytorchcv()),
    "vit_pytorch": Library("vit_pytorch", transformers_of_images.models(), "vit-pytorch"),
    "segmentation_models_pytorch": Library(
        "segmentation_models_pytorch", volumes.segmentation(), "segmentation-models-pytorch"
    ),
    "monai": Library("monai", volumes.monai()),
    "transformers": Library("transformers", huggingface.models()),
    "x_transformers": Library("x_transformers", signals.x_transformers(), "x-transformers"),
    "torchaudio": Library("torchaudio", signals.torchaudio()),
    "braindecode": Library("braindecode", signals.braindecode()),
    "torchcrepe": Library("torchcrepe", signals.torchcrepe()),
    "resemblyzer": Library("resemblyzer", signals.resemblyzer(), "Resemblyzer"),
    "torch_geometric": Library("torch_geometric", graphs.models(), "torch-geometric"),
}
"""The libraries by their names on the command line."""

_BANK = (
    "the fixed filters of its filter bank are parameters that no task trains, counted here as copies"
)
NOTES: dict[str, str] = {
    "FBCNet": f"{_BANK}; its classifier has a max norm, so it is not found as a head.",
    "FBLightConvNet": f"{_BANK}.",
    "FBMSNet": f"{_BANK}; its classifier has a max norm, so it is not found as a head.",
    "IFNet": f"{_BANK}; its classifier has a max norm, so it is not found as a head.",
    "xdensenet40_2_k24_bc_cifar10": "half of its numbers are the fixed masks of sparse convolutions, "
    "which no task trains, counted here as copies.",
}
"""{model: why it misses a target}, where the names of its parameters do not tell."""


def chosen(names: Sequence[str]) -> list[str]:
    """The libraries to trace; all of them for "all".

    Raises:
        ValueError: a name that is no library of the zoo.
        ModuleNotFoundError: some are not installed; the error says how to install them.
    """
    if odd := [name for name in names if name not in LIBRARIES and name != "all"]:
        raise ValueError(
            f"trace: no library {odd[0]!r}. Expected some of {', '.join(LIBRARIES)}, or all."
        )
    wanted = [*LIBRARIES] if "all" in names else list(dict.fromkeys(names))
    missing = [name for name in wanted if find_spec(LIBRARIES[name].package) is None]
    if missing:
        lines = " ".join(LIBRARIES[name].pip for name in missing)
        raise ModuleNotFoundError(
            f"trace: {', '.join(missing)} is not installed. Write pip install {lines}; "
            f"pip install 'hatfn[zoo]' installs every library of the zoo."
        )
    return wanted


def make(names: Sequence[str], model: str) -> Sample:
    """The model of that name in one of the libraries.

    Raises:
        ValueError: none of them has it.
    """
    for name in chosen(names):
        if model in LIBRARIES[name].models:
            return LIBRARIES[name].models[model]()
    known = ", ".join(known for name in chosen(names) for known in LIBRARIES[name].models)
    raise ValueError(f"trace: no model {model!r} in {', '.join(names)}. Expected one of {known}.")


def entries(names: Sequence[str], verify: bool) -> Iterator[Entry]:
    """Yield the row of each model of some libraries."""
    rows = [(name, model) for name in chosen(names) for model in LIBRARIES[name].models]
    return sweep(_row, rows, verify, [LIBRARIES[name].package for name in chosen(names)])


def count(names: Sequence[str]) -> int:
    """How many models some libraries have here."""
    return sum(len(LIBRARIES[name].models) for name in chosen(names))


def page(names: Sequence[str]) -> Page:
    """What examples/zoo.md says besides its rows."""
    versions = [f"{name} {version(LIBRARIES[name].pip)}" for name in chosen(names)]
    return Page(
        title="Models of other libraries, traced",
        made=f"hatfn trace --zoo {' '.join(names)} --verify --out examples/zoo.md",
        source="library",
        versions=", ".join(versions),
        notes=NOTES,
    )


def _row(name: str, model: str, verify: bool) -> Entry:
    return examine(name, model, LIBRARIES[name].models[model], verify)
