import pytest
import torch
from tiny import CPU, tiny_model
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from engine.memory import checkpoint_activations
from kernels.attention import ATTENTION_KERNELS

LEVELS = (False, "selective", "attention", "full", True)


class CountKernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.attention += function in ATTENTION_KERNELS
        self.products += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_checkpointing_levels_keep_gradients_and_recompute_what_they_say(use_moe):
    ids = torch.randint(1, 60, (2, 16), generator=torch.manual_seed(0))
    gradients, calls, kept = {}, {}, {}
    for level in LEVELS:
        model = tiny_model(use_moe=use_moe).train()
        checkpoint_activations(model, level)
        torch.manual_seed(1)
        with MemTracker() as memory:
            loss = model(ids, labels=ids, skip_logits=True).loss
            kept[level] = memory.get_tracker_snapshot()[CPU]["Total"]
            with CountKernels() as count:
                loss.backward()
        calls[level] = count
        gradients[level] = [p.grad for p in model.parameters()]
    layers = len(model.model.layers)
    for level in LEVELS[1:]:
        for mine, plain in zip(gradients[level], gradients[False], strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-7)
    assert [calls[level].attention for level in LEVELS] == [0, 0, 0, layers, layers]
    products = [calls[level].products for level in LEVELS]
    assert products[0] < products[1] == products[2] == products[3] == products[4]
    assert kept[True] == kept["full"] < kept["selective"] < kept[False]
    assert kept["attention"] == kept["selective"], "two names of one level"


@pytest.mark.parametrize("level", LEVELS[1:])
def test_dropout_is_the_same_when_a_block_is_computed_again(level):
    ids = torch.randint(1, 60, (2, 16), generator=torch.manual_seed(0))
    gradients = []
    for chosen in (False, level):
        model = tiny_model(dropout=0.3).train()
        checkpoint_activations(model, chosen)
        torch.manual_seed(1)
        model(ids, labels=ids, skip_logits=True).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, mine in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_level_can_be_taken_back(level):
    ids = torch.randint(1, 60, (2, 16), generator=torch.manual_seed(0))
    model = tiny_model().train()
    products = []
    for chosen in (False, level, False):
        checkpoint_activations(model, chosen)
        loss = model(ids, labels=ids, skip_logits=True).loss
        with CountKernels() as count:
            loss.backward()
        products.append(count.products)
    assert products[0] == products[2] < products[1]
