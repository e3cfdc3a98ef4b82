#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch._inductor.compile, the documented way to compile a graph from make_fx, never looks
# into Inductor's cache of graphs on disk, which is on by default. In every process it lowers the graph
# again and counts a bypass. Inside a tracing context whose fake mode has an environment of shapes, the
# same call on the same graph stores it, and a second process finds it. No warning tells either way; the reason
# ("No shape env") stands in the log of level INFO alone.
#
# Seen: bypass 1, 1 without the context; miss 1, then hit 1 with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/once.py" <<'PY'
import sys
from contextlib import nullcontext

import torch
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

x = torch.arange(6.0).reshape(2, 3)
graph = make_fx(lambda x: (torch.relu(x) * 2,), tracing_mode="fake")(x)
around, inputs = nullcontext(), [x]
if sys.argv[1] == "context":
    mode = FakeTensorMode(shape_env=ShapeEnv())
    around, inputs = tracing(TracingContext(mode)), [mode.from_tensor(x, static_shapes=True)]
with torch.no_grad(), around:
    run = torch._inductor.compile(graph, inputs)
assert torch.equal(run(x)[0], torch.relu(x) * 2)
found = counters["inductor"]
print(*(f"{name} {found['fxgraph_cache_' + name]}" for name in ("bypass", "miss", "hit")), sep=", ")
PY
seen=""
for how in plain plain context context; do
    line=$(TORCHINDUCTOR_CACHE_DIR="$folder/$how" "$folder/venv/bin/python" "$folder/once.py" "$how" | tail -n 1)
    echo "$how: $line"
    seen+="$line;"
done
test "$seen" = "bypass 1, miss 0, hit 0;bypass 1, miss 0, hit 0;bypass 0, miss 1, hit 0;bypass 0, miss 0, hit 1;"
