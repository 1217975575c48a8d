"""The processes that train one LoRA together, each on its share of every optimiser step.

Data parallelism as in PyTorch Distributed (arXiv 2006.15704, Sec. 3.2): every process has the whole model and its own
examples, the gradients are summed, and every process makes the same step. Differences: only the LoRA has gradients, a
few megabytes, so they go in one buffer, once per optimiser step, after the last backward pass; and on the CPU through
gloo, which works on every system. A process that ends is noticed at once, because its connections close. A machine that
vanishes closes nothing: within training the others then give up after ``STEP_WAIT``, elsewhere after ``PATIENT_WAIT``.

    g = sum over backward passes i of g_i     one process: ((g_1 + g_2) + g_3) + g_4     two: (g_1 + g_2) + (g_3 + g_4)

Each g_i is already divided by the number of micro-batches of the step, so the sum is the gradient of the whole step. A
micro-batch is one backward pass if its texts have equal length. With one for each of two processes both orders are the
same sum. In general two orders of summing n numbers differ by at most 2 (n - 1) u sum |g_i| to first order, u being half
a unit in the last place of 1 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., Eq. 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingError

LONGEST_TEXT = 2**16  # bytes of a text that processes tell each other
STEP_WAIT = timedelta(minutes=30)  # longest wait for the others within training
PATIENT_WAIT = timedelta(days=7)  # while one waits for another run, or they compute residuals


class Together:
    """One process alone; :class:`Processes` are several.

    Attributes:
        rank: Number of this process, from 0. Process 0 writes all files.
        size: Number of processes.
        local_rank: Number of this process on its machine, from 0, as the launcher says; the rank if it does not.
        reduced_bytes: Bytes that this process has passed to sums so far.
    """

    rank = 0
    local_rank = 0
    size = 1
    reduced_bytes = 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every parameter's gradient by its sum over the processes."""

    def in_order(self, own: Sequence[float]) -> list[float]:
        """Return the numbers of all processes in the order of their ranks; all give equally many."""
        return list(own)

    def gathered(self, text: str) -> list[str]:
        """Return what every process says, by rank; a text longer than ``LONGEST_TEXT`` bytes is cut.

        Others may take as long as ``PATIENT_WAIT``, as in :meth:`from_first`.
        """
        return [text]

    def from_first(self, numbers: Sequence[int]) -> list[int]:
        """Return the whole numbers of process 0; what others give does not matter."""
        return list(numbers)

    def require_equal(self, text: str, differ: Callable[[int, str, str], str]) -> None:
        """Check that all processes have the same text.

        Args:
            text: What this process has.
            differ: (first process that has something else than process 0, what process 0 has, what it has) -> the sentence
                to raise.

        Raises:
            TrainingError: If one has something else.
        """
        texts = self.gathered(text)
        others = [rank for rank, other in enumerate(texts) if other != texts[0]]
        if others:
            raise TrainingError(differ(others[0], texts[0], texts[others[0]]))


class Processes(Together):
    """The processes of torch's default process group, which must be initialised.

    Raises:
        TrainingError: By every method, if another process has ended or does not answer in time.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = dist.get_node_local_rank(fallback_rank=self.rank)
        self.reduced_bytes = 0
        # Groups of our own, whatever the default group is for.
        self._group = dist.new_group(backend="gloo", timeout=STEP_WAIT)
        self._patient = dist.new_group(backend="gloo", timeout=PATIENT_WAIT)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum in one buffer; a gradient that no process has stays absent, so that its parameter is not changed."""
        gradients = [parameter.grad for parameter in parameters]
        parts = [
            parameter.new_zeros(parameter.numel()) if gradient is None else gradient.detach().reshape(-1)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        present = parameters[0].new_tensor([gradient is not None for gradient in gradients])
        summed = self._sum(torch.cat([*parts, present]).cpu())
        *totals, found = summed.split([*(part.numel() for part in parts), len(parts)])
        for parameter, total, count in zip(parameters, totals, found.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.device, copy=True) if count else None

    def in_order(self, own: Sequence[float]) -> list[float]:
        """Sum vectors that are zero except in this process's place, in float64: nothing is rounded."""
        everyone = torch.zeros(self.size, len(own), dtype=torch.float64)
        everyone[self.rank] = torch.tensor(own, dtype=torch.float64)
        return self._sum(everyone).flatten().tolist()

    def gathered(self, text: str) -> list[str]:
        """Exchange texts as bytes."""
        own = torch.zeros(LONGEST_TEXT, dtype=torch.uint8)
        coded = text.encode()[:LONGEST_TEXT]
        own[: len(coded)] = torch.tensor(bytearray(coded), dtype=torch.uint8)
        everyone = [torch.zeros_like(own) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(everyone, own, group=self._patient))
        return [bytes(one.tolist()).rstrip(b"\0").decode(errors="ignore") for one in everyone]

    def from_first(self, numbers: Sequence[int]) -> list[int]:
        """Send how many there are, then the numbers."""
        first = dist.get_global_rank(self._patient, 0)
        count = torch.tensor([len(numbers)], dtype=torch.int64)
        self._exchange(lambda: dist.broadcast(count, first, group=self._patient))
        given = numbers if self.rank == 0 else [0] * int(count)
        sent = torch.tensor(given, dtype=torch.int64)
        self._exchange(lambda: dist.broadcast(sent, first, group=self._patient))
        return sent.tolist()

    def _sum(self, tensor: Tensor) -> Tensor:
        self._exchange(lambda: dist.all_reduce(tensor, group=self._group))
        self.reduced_bytes += tensor.nbytes
        return tensor

    def _exchange(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # of torch's or of gloo's own making, with an address in it
            raise TrainingError(
                f"Process {self.rank} of {self.size} lost the others: one of them has ended, and its log says why, or has "
                "not answered for too long. Start the run again; it continues from its last saved state."
            ) from error


@contextmanager
def joined() -> Iterator[Together]:
    """Provide the processes that this one was started with: by torchrun, by a launcher built on it, or by the caller.

    torch reads rank, size and address itself. A process group that the caller has initialised is used and left.
    """
    if not dist.is_available() or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield Together()
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", init_method="env://", timeout=STEP_WAIT)
    try:
        yield Processes()
    finally:
        if own:
            dist.destroy_process_group()
