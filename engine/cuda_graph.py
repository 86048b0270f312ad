"""A micro-batch in one launch: a CUDA graph of its forward, loss and backward.

A small model on a fast GPU waits for Python, which starts some 500 kernels one after the other. A
graph records them once and starts them all at once. It runs the same kernels on the same memory
each time, therefore

    inputs      are copied into tensors that stay; empty documents fill up the documents' bounds
    gradients   are tensors that stay: a step's first micro-batch writes them, the others add, so
                that there are two graphs
    outputs     are copied, because the next replay writes over them

Batches of another shape (the last of an epoch) run as without a graph, with the same result. The
graphs' activations keep their memory while the run validates and samples.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.runtime import Runtime
from kernels.experts import has_grouped_kernel

BOUNDS = "cu_seq_lens_q"  # int32 (documents + 1,), the one input of no fixed length
CALLS_BEFORE = 4  # micro-batches without a graph: they compile, and show how many documents come
MORE_DOCUMENTS = 1.5  # times the most seen so far is what the graph takes
Replay = tuple[dict[str, torch.Tensor], Callable[[], None]]


def with_graph(forward_backward: Callable, model, config: dict, rt: Runtime) -> Callable:
    """forward_backward as the loop calls it: itself, or what `cuda_graph` makes of it."""
    if not config["cuda_graph"]:
        return forward_backward
    if problem := find_problem(model, config, rt):
        rt.say(f"cuda_graph: not used, because {problem}.")
        return forward_backward
    return GraphedStep(forward_backward)


def find_problem(model, config: dict, rt: Runtime) -> str | None:
    """Why a micro-batch cannot be recorded here."""
    if rt.device.type != "cuda":
        return "only a CUDA GPU has it"
    if rt.world > 1:
        return "the ranks exchange gradients inside of backward"
    if config["gradient_checkpointing"]:
        return "gradient_checkpointing reads the state of the random numbers"
    if any(block._compiled_call_impl is None for block in model.model.layers):
        return "it needs torch_compile"
    dtype, sizes = rt.dtype or torch.float32, (model.config.d_model, model.config.moe_d_ff)
    if model.config.use_moe and not has_grouped_kernel(rt.device, dtype, *sizes):
        return (
            "experts wait for the GPU. On an H100 or B200, with sizes that are multiples of 8, "
            'set mixed_precision to "bf16"'
        )
    return None


class Recorder:
    """Records functions' kernels. The graphs share memory: they run one after the other."""

    def __init__(self):
        self.pool = None

    def __call__(self, function: Callable[[], dict[str, torch.Tensor]]) -> Replay:
        """Returns the function's outputs, and what runs its kernels: nothing has run yet."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads pin the next batch's memory, or copy a checkpoint.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = function()
        self.pool = graph.pool()
        return outputs, graph.replay


class GraphedStep:
    """forward_backward(model, batch, num_items, rt) that replays graphs.

    record: a Recorder. A test on a CPU gives another.
    """

    def __init__(self, forward_backward: Callable, record: Callable | None = None):
        self.forward_backward, self.record = forward_backward, record or Recorder()
        self.calls = self.bounds = 0
        self.shape = torch.Size([0])  # of a full batch
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self.graphs: dict[bool, Replay] = {}  # by whether gradients are added

    def __call__(self, model, batch: dict, num_items: int, rt: Runtime) -> dict[str, torch.Tensor]:
        # Filled by a kernel: a copy of a number would make the host wait for the GPU.
        items = torch.full((), num_items, device=rt.device)
        adds = any(parameter.grad is not None for parameter in model.parameters())
        self.calls += 1
        if self.calls <= CALLS_BEFORE:
            self.shape = max(self.shape, batch["input_ids"].shape, key=torch.Size.numel)
            self.bounds = max(self.bounds, int(MORE_DOCUMENTS * len(batch[BOUNDS])))
        if self.calls == CALLS_BEFORE:  # nothing can be compiled while a graph is recorded
            batch = self._filled_up(batch)
        is_usual = batch["input_ids"].shape == self.shape and len(batch[BOUNDS]) <= self.bounds
        can_add = self.gradients or not adds
        if self.calls <= CALLS_BEFORE or not is_usual or not can_add:
            return self.forward_backward(model, batch, items, rt)
        self._fill_inputs(batch | {"num_items": items})
        if adds:
            self._add_from_here()
        if adds not in self.graphs:
            self._record(model, rt, adds)
        outputs, replay = self.graphs[adds]
        replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return {name: tensor.clone() for name, tensor in outputs.items()}

    def _filled_up(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With as many documents as the graph takes."""
        missing = self.bounds - len(batch[BOUNDS])
        end = batch["input_ids"].numel()  # an empty document begins and ends there
        return batch | {BOUNDS: F.pad(batch[BOUNDS], (0, missing), value=end)}

    def _fill_inputs(self, batch: dict[str, torch.Tensor]):
        batch = self._filled_up(batch)
        if not self.inputs:
            self.inputs = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
        for name, tensor in self.inputs.items():
            tensor.copy_(batch[name])

    def _add_from_here(self):
        """Gradients that a micro-batch without a graph left move to where the graph adds."""
        for parameter, gradient in self.gradients:
            if parameter.grad is None:
                gradient.zero_()
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def _record(self, model, rt: Runtime, adds: bool):
        batch = {name: tensor for name, tensor in self.inputs.items() if name != "num_items"}

        def run():
            return self.forward_backward(model, batch, self.inputs["num_items"], rt)

        self.graphs[adds] = self.record(run)
        if not adds:
            pairs = ((parameter, parameter.grad) for parameter in model.parameters())
            self.gradients = [(p, gradient) for p, gradient in pairs if gradient is not None]
