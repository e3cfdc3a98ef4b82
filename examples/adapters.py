"""A frozen transformer with LoRA adapters, three text tasks, gates on the adapters alone.

    python examples/adapters.py

The transformer keeps its weights once for all tasks; a state holds the adapters, a head and a mask for
each task, and the optimizer's moments. The script needs ``pip install transformers peft``, downloads
nothing, and takes about a minute on two cores.
"""

from __future__ import annotations

import optree
import torch
import torchopt
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import hatfn

WORDS = [
    "<pad>", "the", "was", "in", "on", "near", "film", "meal", "city", "shown", "cooked", "built",
    "long", "salty", "old", "paris", "rome", "oslo", "good", "great", "fine", "bad", "poor", "awful",
    "why", "where", "who", "?",
]  # fmt: skip
GOOD, BAD = ("good", "great", "fine"), ("bad", "poor", "awful")
LENGTH = 12


def sentences(task: int, count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Texts of a task as inputs of the transformer, and their classes.

    Task 0: praise or blame. Task 1: about a film, a meal or a city. Task 2: a question or not.
    """
    draw = torch.Generator().manual_seed(seed)

    def pick(*words: str) -> str:
        return words[int(torch.randint(len(words), (), generator=draw))]

    topics = (("film", "shown", "long"), ("meal", "cooked", "salty"), ("city", "built", "old"))
    texts, labels = [], []
    for _ in range(count):
        praise, topic, asked = (int(torch.randint(n, (), generator=draw)) for n in (2, 3, 2))
        noun, verb, kind = topics[topic]
        place = [pick("in", "on", "near"), pick("paris", "rome", "oslo")]
        text = ["the", kind, noun, "was", pick(*(GOOD if praise else BAD)), verb, *place]
        texts.append([pick("why", "where", "who"), *text, "?"] if asked else text)
        labels.append((praise, topic, asked)[task])
    ids = torch.tensor([[*map(WORDS.index, text), *[0] * (LENGTH - len(text))] for text in texts])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.tensor(labels)


def main() -> None:
    """Train the three tasks, print accuracy, drift and the size of the state."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=LENGTH, num_labels=3, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["query", "value", "dense"], task_type="SEQ_CLS"
    )
    module = get_peft_model(BertForSequenceClassification(config), lora)
    tasks, classes = range(3), [2, 3, 2]
    train = [sentences(task, 1024, seed=task) for task in tasks]
    test = [sentences(task, 512, seed=100 + task) for task in tasks]

    wiring = hatfn.trace(module, train[0][0])  # the classifier is found
    adapters = [group for group in wiring.groups if "lora" in group]
    wiring = hatfn.select(wiring, adapters)
    hat = hatfn.build(module, wiring, classes, torchopt.adam(3e-3), s_max=100.0)
    state, scale = hat.init(seed=0), hatfn.schedule.linear(100.0)
    served = {}
    for task in tasks:
        x, y = train[task]
        state = hat.begin(state, task)
        for step in range(240):
            rows = torch.arange(64) + 64 * (step % 16)
            batch = {name: value[rows] for name, value in x.items()}, y[rows]
            state, _ = hat.update(state, batch, task, scale((step % 48) / 47))
        state = hat.consolidate(state, task, [(x, y)])
        served[task] = hat.forward(state, test[task][0], task).logits

    for task in tasks:
        logits = hat.forward(state, test[task][0], task).logits
        accuracy = hatfn.metrics.accuracy(logits, test[task][1])
        print(
            f"task {task}: accuracy {accuracy:.3f}, drift {hatfn.metrics.drift(served[task], logits)}"
        )
        assert torch.equal(logits, served[task])
    report(hat, state)


def report(hat: hatfn.HAT, state: hatfn.HATState) -> None:
    """Print how large the state is beside the adapters and the frozen weights."""

    def size(tensors: object) -> int:
        return sum(leaf.nbytes for leaf in optree.tree_leaves(tensors))  # type: ignore[arg-type]

    adapters = size({name: value for name, value in state.params.items() if "lora" in name})
    print(f"frozen weights, kept once: {size(hat.network.untrained) / 1e6:.2f} MB")
    print(
        f"adapters: {adapters / 1e6:.3f} MB, the whole state: {size(state) / adapters:.1f} times that"
    )
    assert size(state) <= 6 * adapters


if __name__ == "__main__":
    main()
