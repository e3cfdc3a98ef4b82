"""Two tasks in one network: learning the second does not move the first one's logits by a bit.

    python examples/lesson_first_two_tasks.py

It takes a few seconds.
"""

import torch
import torchopt
from torch import Tensor

import hatfn
from hatfn.models import MLP


def points(seed: int) -> tuple[Tensor, Tensor]:
    """A task's data: 300 points around three centres in 16 dimensions, and which centre each is of."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(300) % 3
    return 2 * torch.randn(3, 16, generator=draw)[y] + torch.randn(300, 16, generator=draw), y


tasks = [points(seed=0), points(seed=1)]
net = MLP(features=16, classes=3, width=64)
wiring = hatfn.trace(net, tasks[0][0][:1])  # which units produce and feed each weight
optimizer = torchopt.adamw(1e-2, weight_decay=0.1)  # momentum and weight decay do no harm
hat = hatfn.build(net, wiring, classes=[3, 3], optimizer=optimizer, s_max=100.0)
state, scale = hat.init(seed=0, fresh=True), hatfn.schedule.linear(100.0)
logits = {}
for t, (x, y) in enumerate(tasks):
    state = hat.begin(state, t)  # protects what the learned tasks use
    for step in range(80):
        state, info = hat.update(state, (x, y), t, scale(step % 20 / 19))
    state = hat.consolidate(state, t, [(x, y)])  # the task's binary gates become its mask
    logits[t] = hat.forward(state, x, t)
    print(f"task {t}: accuracy {hatfn.metrics.accuracy(logits[t], y):.2f}")
now = hat.forward(state, tasks[0][0], task=0)
print("drift of task 0:", hatfn.metrics.drift(logits[0], now))
assert torch.equal(now, logits[0])
