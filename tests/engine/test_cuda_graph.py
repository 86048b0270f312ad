"""A micro-batch as a CUDA graph. A recorder that replays on a CPU stands in for CUDA's."""

from functools import partial

import gpu_like
import pytest
import torch
from tiny import cpu_runtime, tiny_model
from torch.testing import assert_close

from corpus.packing import PackedCollator
from engine.cuda_graph import GraphedStep, with_graph
from engine.optim import step
from train_llm import forward_backward

LENGTH = 16


class Rerun:
    """Runs the function again at each replay, on the same inputs and into the same tensors.

    As with CUDA's graphs, outputs and gradients hold nothing of use before the first replay.
    """

    def __init__(self, parameters):
        self.parameters, self.recorded, self.replays = list(parameters), 0, 0
        self.gradients = []

    def __call__(self, function):
        self.recorded += 1
        before = [p.grad if p.grad is None else p.grad.clone() for p in self.parameters]
        random = torch.get_rng_state()
        adds = before[0] is not None
        outputs = function()
        torch.set_rng_state(random)
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad.copy_(gradient) if adds else parameter.grad.fill_(torch.nan)
        if not adds:
            self.gradients = [parameter.grad for parameter in self.parameters]
        return outputs, partial(self.replay, function, outputs, adds)

    def replay(self, function, outputs, adds):
        self.replays += 1
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient if adds else None
        for name, tensor in function().items():
            outputs[name].copy_(tensor)
        if not adds:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                gradient.copy_(parameter.grad)


def batches(documents_of_a_batch: list[list[int]]) -> list[dict]:
    """A batch of rows of LENGTH tokens for each list of how many documents are in a row."""
    collate = PackedCollator(LENGTH, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)

    def row(documents: int) -> dict:
        ids = torch.randint(1, 60, (LENGTH,), generator=generator).numpy()
        positions = [*range(LENGTH - documents + 1), *[0] * (documents - 1)]
        return {"input_ids": ids, "position_ids": positions}

    return [collate([row(count) for count in counts]) for counts in documents_of_a_batch]


# Twelve steps of three micro-batches: usual ones, one of many documents, a short one.
USUAL, MANY, SHORT = [1, 2, 3], [9, 9, 9], [2]
STEPS = [[USUAL] * 3 for _ in range(12)]
STEPS[5], STEPS[7], STEPS[9] = [MANY, USUAL, USUAL], [USUAL, MANY, USUAL], [USUAL, USUAL, SHORT]
STEPS[11] = [SHORT, USUAL, USUAL]


def train(dropout: float, graphed: bool):
    torch.manual_seed(0)
    rt, model = cpu_runtime(), tiny_model(max_seq_len=LENGTH, dropout=dropout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Rerun(model.parameters())
    micro_step = GraphedStep(forward_backward, record) if graphed else forward_backward
    losses = []
    for number, counts in enumerate(STEPS):
        rt.seed(42, number)
        outputs = [micro_step(model, batch, 100, rt) for batch in batches(counts)]
        losses.append([float(output["loss"]) for output in outputs])
        step(model, [optimizer], rt, 1.0)
    return model, losses, record


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_the_same_with_and_without_graphs(dropout):
    (graphed, losses, record), (plain, expected, _) = (train(dropout, on) for on in (True, False))
    assert losses == expected
    for name, tensor in plain.state_dict().items():
        assert_close(graphed.state_dict()[name], tensor, rtol=0, atol=0)
    assert record.recorded == 2, "one graph writes the gradients, one adds"
    assert record.replays >= 20, "most micro-batches are replays"


def test_the_bounds_have_one_length_in_every_replay():
    lengths = []

    def look(model, batch, num_items, rt):
        lengths.append(len(batch["cu_seq_lens_q"]))
        assert batch["cu_seq_lens_q"].max() == batch["input_ids"].numel()
        return forward_backward(model, batch, num_items, rt)

    model, rt = tiny_model(max_seq_len=LENGTH), cpu_runtime()
    graphed = GraphedStep(look, Rerun(model.parameters()))
    for batch in batches([[1, 1, 1], [3, 3, 3]] * 10):
        graphed(model, batch, 10, rt)
        model.zero_grad()
    assert lengths[:3] == [4, 10, 4]
    assert len(set(lengths[3:])) == 1, "the last call without a graph compiles what is recorded"


class Card(torch.nn.Module):
    """What with_graph looks at."""

    def __init__(self, compiles=True, use_moe=False, **sizes):
        super().__init__()
        self.model = tiny_model(use_moe=use_moe, **sizes).model
        self.config = self.model.config
        if compiles:
            for block in self.model.layers:
                block.compile(backend="eager")


@pytest.mark.parametrize(
    ("card", "changes", "place", "word"),
    [
        (Card(), {}, {"device": torch.device("cpu")}, "only a CUDA GPU has it"),
        (Card(), {}, {"world": 2}, "the ranks exchange gradients inside of backward"),
        (Card(), {"gradient_checkpointing": "full"}, {}, "gradient_checkpointing reads the state"),
        (Card(compiles=False), {}, {}, "it needs torch_compile"),
        (Card(use_moe=True), {}, {"dtype": torch.float16}, 'set mixed_precision to "bf16"'),
        (Card(), {}, {}, None),
        (Card(), {"cuda_graph": False}, {}, False),
    ],
)
def test_where_a_graph_is_used_and_why_not(capsys, card, changes, place, word):
    rt = cpu_runtime()
    for name, value in ({"device": torch.device("cuda")} | place).items():
        setattr(rt, name, value)
    config = {"cuda_graph": True, "gradient_checkpointing": False} | changes
    chosen = with_graph(forward_backward, card, config, rt)
    out = capsys.readouterr().out
    assert isinstance(chosen, GraphedStep) is (word is None)
    assert not out if not word else out.startswith("cuda_graph: not used, because ") and word in out


@pytest.mark.parametrize(
    ("capability", "sizes", "used"),
    [
        ((8, 6), {}, False),
        ((9, 0), {}, True),
        ((9, 0), {"moe_d_ff": 12}, False),  # rows of 24 bytes
        ((12, 0), {}, False),
    ],
)
def test_experts_are_recorded_where_the_grouped_product_does_not_wait(capability, sizes, used):
    """Elsewhere a copy from the GPU inside of the recording would end the run."""
    rt = cpu_runtime(torch.bfloat16)
    rt.device = torch.device("cuda")
    config = {"cuda_graph": True, "gradient_checkpointing": False}
    with gpu_like.card(capability):
        chosen = with_graph(forward_backward, Card(use_moe=True, **sizes), config, rt)
    assert isinstance(chosen, GraphedStep) is used
