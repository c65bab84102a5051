"""Many small networks trained at once: what every benchmark that trains goes through.

Every tensor has a seed axis in front, weights and scores a configuration axis behind it. Nothing
mixes the networks of a stack, so that the gradient of the sum of their losses is that of each, and
Adam, which works entry by entry, trains each as if it were alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import proxy_losses as P

Weights = list[Tensor]  # weight [.., in, out] and bias [.., 1, out] of every layer in turn


class SparseRows:
    """Sparse rows of one seed, in the place of a tensor [1, rows, features]."""

    def __init__(self, rows: Any) -> None:
        """A csr_array of floats."""
        self.rows = rows

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> SparseRows:
        """A slice of the seeds, or (seeds, rows) [1, some] as of a tensor."""
        return self if isinstance(index, slice) else SparseRows(self.rows[index[1][0].numpy()])

    def times(self, weight: Tensor) -> Tensor:
        """[1, configurations, rows, out], of weights [1, configurations, features, out]."""
        _, kinds, features, out = weight.shape
        flat = weight[0].movedim(1, 0).reshape(features, kinds * out)
        product: Tensor = _SparseProduct.apply(flat, self.rows)
        return product.view(-1, kinds, out).movedim(0, 1).contiguous()[None]


class _SparseProduct(torch.autograd.Function):
    """Sparse rows times weights [features, columns]; the gradient is that of the weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Any) -> Tensor:
        ctx.rows = rows
        return torch.from_numpy(rows @ weight.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.rows.T @ grad.numpy()), None


class Part(NamedTuple):
    """Rows of every seed."""

    x: Tensor | SparseRows  # [seeds, rows, features]
    y: Tensor  # [seeds, rows]


class Budget(NamedTuple):
    """How long networks are trained, alike for all that are compared."""

    steps: int
    every: int = 1  # steps from one look at them to the next
    batch: int | None = None  # rows of a step, None for all
    patience: int | None = None  # steps without a better look after which none counts any more
    fall: bool = False  # of the learning rates, to 0 at the last step


class Setup(NamedTuple):
    """What a loss may know before the first step."""

    values: tuple[Any, ...]  # its own parameter, one per configuration
    before: Callable[[], Tensor]  # scores [seeds, rows] of the training rows, where all start
    score: Callable[[], Tensor]  # [seeds, configurations, rows], as they are when it is called
    y: Tensor  # [seeds, rows]
    steps: int


class Batch(NamedTuple):
    """The rows of a step."""

    y: Tensor  # [seeds, rows]
    rows: Tensor | None  # [seeds, rows] int64, numbers of training rows; None for all
    step: int  # from 0


Loss = Callable[[Tensor, Batch], Tensor]  # scores [seeds, configurations, rows] -> one per network
Make = Callable[[Setup], Loss]


class Arm(NamedTuple):
    """A loss, and the configurations of it that are trained side by side."""

    name: str
    make: Make
    rates: tuple[float, ...]  # of the optimizer, one per configuration
    parameter: str | None = None  # what the values are
    values: tuple[Any, ...] = ()  # one per configuration
    modules: tuple[str, ...] = ()  # of a peer, to import
    batches: Literal["plain", "enriched"] = "plain"  # enriched: a fifth are positives
    optimizer: Literal["Adam", "SOAP"] = "Adam"
    decays: tuple[float, ...] = ()  # L2 penalties of the weights, one per configuration; none

    def configurations(self) -> list[dict[str, Any]]:
        """What is tried, in words and numbers."""
        values = [{} if self.parameter is None else {self.parameter: v} for v in self.values]
        values = values or [{}] * len(self.rates)
        if self.decays:
            values = [{"decay": d, **v} for d, v in zip(self.decays, values, strict=True)]
        return [{"rate": r, **named} for r, named in zip(self.rates, values, strict=True)]


class Fitted(NamedTuple):
    """Best checkpoint of every network."""

    value: Tensor  # [seeds, configurations] float64, of what judged it
    step: Tensor  # [seeds, configurations] int64; 0 is where it started
    weights: Weights
    evaluations: int  # checkpoints looked at, per network

    def choose(self) -> tuple[Tensor, Weights]:
        """(the best configuration of every seed, its weights [seeds, ...])."""
        chosen = self.value.argmax(1)
        seeds = torch.arange(len(chosen))
        return chosen, [w[seeds, chosen] for w in self.weights]


def scores(weights: Weights, x: Tensor | SparseRows) -> Tensor:
    """[seeds, configurations, rows].

    x is [seeds, rows, features]: the configurations of a seed see the same rows.
    """
    if isinstance(x, SparseRows):
        h = x.times(weights[0]) + weights[1]
    else:
        h = torch.einsum("sbd,skdh->skbh", x, weights[0]) + weights[1]
    for weight, bias in zip(weights[2::2], weights[3::2], strict=True):
        h = h.relu() @ weight + bias
    return h[..., 0]


@torch.no_grad()
def score_all(weights: Weights, x: Tensor | SparseRows) -> Tensor:
    """`scores`, one seed at a time to save memory."""
    return torch.cat([scores([w[s : s + 1] for w in weights], x[s : s + 1]) for s in range(len(x))])


def average_precision(found: Tensor, y: Tensor) -> Tensor:
    """[seeds, configurations] float64, of scores [seeds, configurations, rows]."""
    from sklearn.metrics import average_precision_score

    values = [
        [average_precision_score(truth, row) for row in rows]
        for truth, rows in zip(y.numpy(), found.numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


class Training:
    """All configurations of an arm for all seeds, from weights [seeds, ...]."""

    def __init__(
        self, part: Part, arm: Arm, start: Weights, budget: Budget, order: Tensor | None = None,
        tick: Callable[[], Any] = lambda: None,
    ) -> None:  # fmt: skip
        """`order` [seeds, steps, batch] are row numbers; None: every step sees all rows."""
        self.part, self.budget, self.order, self.tick = part, budget, order, tick
        # Configurations of one rate and penalty are one tensor; an optimizer knows one of each.
        settings = zip(arm.rates, arm.decays or (0.0,) * len(arm.rates), strict=True)
        spans = [(*setting, len([*run])) for setting, run in groupby(settings)]
        self.stacks = [
            [w[:, None].repeat(1, n, *[1] * (w.dim() - 1)).requires_grad_() for w in start]
            for *_, n in spans
        ]
        groups = []
        for parameters, (rate, decay, _) in zip(self.stacks, spans, strict=True):
            if decay:
                groups += [
                    {"params": parameters[::2], "lr": rate, "weight_decay": decay},
                    {"params": parameters[1::2], "lr": rate},
                ]
            else:
                groups.append({"params": parameters, "lr": rate})
        self.rates = [group["lr"] for group in groups]
        self.optimizer = _optimizer(arm)(groups)
        self.done = 0

        def before() -> Tensor:
            return score_all([w[:, None] for w in start], part.x)[:, 0]

        self.loss = arm.make(Setup(arm.values, before, self.score, part.y, budget.steps))

    def weights(self) -> Weights:
        """Each [seeds, configurations, ...]."""
        if len(self.stacks) == 1:
            return self.stacks[0]
        return [torch.cat(tensors, 1) for tensors in zip(*self.stacks, strict=True)]

    def score(self) -> Tensor:
        """Of all training rows, as the networks are now."""
        return score_all(self.weights(), self.part.x)

    def step(self, number: int) -> None:
        """One step of every network, the first is 0."""
        (x, y), rows = self.part, None
        if self.order is not None:
            rows, seeds = self.order[:, number], torch.arange(len(x))[:, None]
            x, y = x[seeds, rows], y[seeds, rows]
        if self.budget.fall:
            left = 1 - (number + 1) / self.budget.steps
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * left
        self.optimizer.zero_grad()
        self.loss(scores(self.weights(), x), Batch(y, rows, number)).sum().backward()
        self.optimizer.step()
        self.tick()

    def after(self, steps: Iterable[int]) -> Iterator[tuple[int, Weights]]:
        """The networks after each of these numbers of steps, ascending."""
        for until in steps:
            while self.done < until:
                self.step(self.done)
                self.done += 1
            yield until, [w.detach().clone() for w in self.weights()]

    def fit(self, judge: Callable[[Weights], Tensor], tol: float = 0.0) -> Fitted:
        """The checkpoint of every network that `judge` finds best, the start included.

        A later one wins if it is better by more than tol.
        """
        budget = self.budget
        steps = self.after(range(0, budget.steps + 1, budget.every))
        _, best = next(steps)
        high, evaluations = judge(best), 1
        at = torch.zeros_like(high, dtype=torch.int64)
        for step, now in steps:
            value = judge(now)
            evaluations += 1
            better = value > high + tol
            if budget.patience is not None:
                better &= step - at <= budget.patience
            high, at = torch.where(better, value, high), torch.where(better, step, at)
            best = [
                torch.where(better.view(*better.shape, *[1] * (w.dim() - 2)), w, b)
                for w, b in zip(now, best, strict=True)
            ]
        return Fitted(high, at, best, evaluations)


class Queued:
    """A loss of ours over batch and queue, mapped over models [K], each with its own queue."""

    def __init__(
        self, loss: Callable[..., Any], rows: int, models: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Without rows there is no queue; a single model is not mapped."""
        each, self.loss = 0 if rows else None, loss
        self.call = torch.func.vmap(loss, in_dims=(0, 0, each, 0), out_dims=(0, each))
        fields = P.init_queue(rows, 1, dtype=dtype) if rows else ()
        self.queue = self.empty = fields and P.QueueState(
            *(field.expand(models, *field.shape).clone() for field in fields)
        )

    def __call__(self, scores: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        """[K], of scores [K, N], y [K, N] bool and tau [K]; the batch is then in the queue."""
        queue = self.queue or None
        if len(tau) == 1:
            one = queue and P.QueueState(*(field[0] for field in queue))
            losses, queue = self.loss(scores[0, :, None], y[0].long(), one, tau[0])
            losses, queue = losses[None], queue and P.QueueState(*(f[None] for f in queue))
        else:
            losses, queue = self.call(scores[..., None], y.long(), queue, tau)
        self.queue = queue and P.QueueState(*(field.detach() for field in queue))
        return losses

    def clear(self, which: Tensor) -> None:
        """Empty the queues of some models, which [K] bool."""
        self.queue = self.queue and P.QueueState(*(
            torch.where(which.view(-1, *[1] * (a.dim() - 1)), a, b)
            for a, b in zip(self.empty, self.queue, strict=True)
        ))  # fmt: skip


def missing(arm: Arm) -> str | None:
    """Why a peer's arm cannot run, None if it can."""
    for module in arm.modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer's import may fail in any way
            return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


def _optimizer(arm: Arm) -> Callable[..., torch.optim.Optimizer]:
    """Takes parameter groups."""
    if arm.optimizer == "Adam":
        return torch.optim.Adam
    from libauc.optimizers import SOAP

    return lambda groups: SOAP(groups, mode="adam", verbose=False, device="cpu")


def each(make: Callable[[Any, Setup], Callable[..., Tensor]]) -> Make:
    """A loss of one network at a time, made from a value for each, called in a loop.

    It is called with the scores of the network, `Batch.y` and `Batch.rows` of its seed, and the
    step.
    """

    def of(setup: Setup) -> Loss:
        calls = [[make(value, setup) for value in setup.values] for _ in setup.y]

        def loss(found: Tensor, batch: Batch) -> Tensor:
            return torch.stack([
                torch.stack([
                    call(one, batch.y[s], None if batch.rows is None else batch.rows[s], batch.step)
                    for call, one in zip(calls[s], of_seed.unbind(0), strict=True)
                ])
                for s, of_seed in enumerate(found.unbind(0))
            ])  # fmt: skip

        return loss

    return of
