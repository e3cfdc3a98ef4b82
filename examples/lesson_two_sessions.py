"""Two sessions: one learns, saves and ends; a new process loads, adds a task, and goes on.

    python examples/lesson_two_sessions.py

The script starts itself a second time, with the folder of the files as its argument.
"""

import subprocess
import sys
import tempfile

import torch
import torchopt

import hatfn
from hatfn.models import MLP


def learn(hat: hatfn.HAT, state: hatfn.HATState, t: int) -> hatfn.HATState:
    """The state with task t learned as well: to tell points around a centre of its own from others."""
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(t))
    x, y = torch.cat([x, x + 1.5 * x[t].sign()]), torch.arange(400) // 200
    state, scale = hat.begin(state, t), hatfn.schedule.linear(100.0)
    for step in range(60):
        state, _ = hat.update(state, (x, y), t, scale(step % 20 / 19))
    return hat.consolidate(state, t, [(x, y)])


x, net = torch.linspace(-1, 1, 8 * 16).reshape(8, 16), MLP(features=16, classes=2, width=64)
hat = hatfn.build(net, hatfn.trace(net, x), classes=[2], optimizer=torchopt.adam(1e-2), s_max=100.0)
if len(sys.argv) == 1:  # the first session: it knows of one task, and starts the second at its end
    state, folder = learn(hat, hat.init(seed=0, fresh=True), 0), tempfile.mkdtemp()
    hatfn.save(f"{folder}/state.safetensors", state, hat)
    torch.save(hat.forward(state, x, task=0), f"{folder}/logits.pt")
    subprocess.run([sys.executable, __file__, folder], check=True)
else:  # the second session: another process, another task
    hat, state = hatfn.grow(hat, hatfn.load(f"{sys.argv[1]}/state.safetensors", hat), classes=[2])
    state = learn(hat, state, 1)
    assert torch.equal(hat.forward(state, x, task=0), torch.load(f"{sys.argv[1]}/logits.pt"))
    print("the logits of task 0 are equal to the bit; now:", state)
