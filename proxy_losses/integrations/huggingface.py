"""Hugging Face: losses for `transformers.Trainer(compute_loss_func=...)`, and their callback."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_flag
from ..distributed import world_size
from ..nn._wrapper import takes
from ._common import find_wrappers, own_queue_losses, progress, reset_losses

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "proxy_losses.integrations.huggingface needs transformers: "
            "pip install '.[huggingface]' in a clone of this library"
        ) from error

ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)  # they broadcast
TRAINER_IGNORES = -100  # the label that the Trainer leaves out of num_items_in_batch


def make_compute_loss(
    loss_fn: nn.Module, *, logits: str | int = "logits", ignore_index: int = TRAINER_IGNORES
) -> Callable[..., Tensor]:
    """A loss as `transformers.Trainer(compute_loss_func=...)` takes it.

    Logits [..., C] and labels [...] (token classification: [N, L, C] and [N, L]) become rows
    [M, C] and [M], without the rows of ignore_index, which would take slots of the queue; labels
    [..., C] are multi-label: rows of ignore_index alone are left out, and where a row has other
    labels too, those of ignore_index are unknown (``label_mask``). For a loss with num_classes=1 a
    head of two logits becomes the one score logits[1] - logits[0], whose binary cross-entropy is
    the cross-entropy of the two.

    The Trainer does not average micro-batches (of gradient accumulation, or of processes with
    ``average_tokens_across_devices``) itself: it passes num_items_in_batch, the labels of them all.
    Each loss is weighed by its share of those, so that cross-entropy adds up to that of the whole
    batch. A ranking loss does not: the average over micro-batches of the loss of each with the
    queue is not the loss of the whole batch. Use a larger queue.

    Logits without gradient are of an evaluation: the queue is read, not written.

    Args:
        loss_fn: module (logits [M, C], labels) -> loss, or a tuple with the loss first.
        logits: key or index of the logits in the model's outputs.
        ignore_index: label of the rows to leave out.

    Returns:
        A function (outputs, labels, num_items_in_batch=None) -> scalar loss.

    Raises:
        ValueError: from the function; no labels, shapes that do not match, unknown labels for a
            loss without an argument ``label_mask``, labels [M] beside logits [M, C] for a torch
            loss of pairs of equal shape (`nn.MSELoss`), or several GPUs in one process
            (`nn.DataParallel`).

    Example:
        >>> from proxy_losses.integrations.huggingface import make_compute_loss
        >>> compute_loss = make_compute_loss(SmoothAPLoss(num_classes=1, temperature=0.5))
        >>> outputs = {"logits": torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.5, 0.5]])}
        >>> round(compute_loss(outputs, torch.tensor([0, 1, -100])).item(), 3)
        0.468
    """
    masks = takes(loss_fn, "label_mask", by_name=True)
    binary = getattr(getattr(loss_fn, "main_loss", loss_fn), "num_classes", None) == 1
    of_pairs = getattr(loss_fn, "warmup_loss", loss_fn)

    def compute_loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        scores = outputs[logits]
        if labels is None:
            raise ValueError("labels: expected a tensor, got None; is the data's column 'labels'?")
        x, y = _rows(scores, labels, binary)
        known = y != ignore_index
        if x.shape[1:] != y.shape[1:] and isinstance(of_pairs, ELEMENTWISE):
            raise ValueError(
                f"labels: expected those of {type(of_pairs).__name__} to have the shape of its "
                f"logits {list(x.shape)}, got {list(y.shape)}, which torch would compare each with "
                "each; pass a function such as lambda z, y: mse_loss(z[:, 0], y.float())"
            )
        keep, extra = known if y.dim() == 1 else known.any(-1), {}
        x, y, known = x[keep], y[keep], known[keep]
        if y.dim() == 2 and (world_size() > 1 or not known.all()):  # on all processes, or none
            if masks:
                extra = {"label_mask": known}
            elif not known.all():
                raise ValueError(
                    f"labels: expected rows of labels, or of ignore_index={ignore_index} alone, "
                    f"for {type(loss_fn).__name__}, which has no argument 'label_mask'; got rows "
                    "of both"
                )
            y = y.masked_fill(~known, 0)
        training = loss_fn.training
        loss_fn.train(training and scores.requires_grad)
        try:
            out = loss_fn(x, y, **extra)
        finally:
            loss_fn.train(training)
        loss: Tensor = out[0] if isinstance(out, tuple) else out
        if num_items_in_batch is None:
            return loss
        share = _share(labels, num_items_in_batch)
        return torch.where(share > 0, loss * share, 0.0)  # the mean of no rows may be NaN

    return compute_loss


def _rows(logits: Tensor, labels: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
    lead, classes = logits.shape[:-1], logits.shape[-1]
    many = classes > 1 and labels.shape == logits.shape
    if not many and labels.shape not in (lead, (*lead, 1)):
        raise ValueError(
            f"labels: expected {list(lead)}, or {list(logits.shape)} for multi-label, to go with "
            f"logits {list(logits.shape)}; got {list(labels.shape)}"
        )
    x = logits.reshape(-1, classes)
    if binary and classes == 2:
        x = x[:, 1:] - x[:, :1]
    return x, labels.reshape(-1, classes) if many else labels.reshape(-1)


def _share(labels: Tensor, num_items: Tensor | int) -> Tensor:
    if isinstance(num_items, Tensor) and num_items.numel() > 1:
        raise ValueError(
            "several GPUs in one process (nn.DataParallel): expected one process per GPU; start "
            "with torchrun or accelerate launch"
        )
    return (labels != TRAINER_IGNORES).sum() / torch.as_tensor(num_items).reshape(())


class LossScheduleCallback(TrainerCallback):
    """Drives, logs and checkpoints the schedules of a loss outside of the model.

    The step clock is `state.global_step`, which counts optimizer steps: with gradient accumulation
    `warmup_steps`, `blend_steps` and `temp_decay_steps` are optimizer steps. The epoch clock counts
    passes over the data.

    The Trainer saves model, optimizer and generators. This callback adds the state of the loss,
    ``loss_state.pt``, to each checkpoint (one file for each process if the queues differ), and
    reads it when `train(resume_from_checkpoint=...)` resumes. A `train()` that starts at step 0 is
    a run of its own, such as the next trial of a search: it starts with empty queues
    and the schedule's first step, whatever the loss went through before.

    main_weight, temperature and phase (0 warmup, 1 blend, 2 main) join what the Trainer logs, and
    its `state.log_history`. Reporters see them if they come later: `report_to="none"` and
    `callbacks=[LossScheduleCallback(loss_fn), TensorBoardCallback()]`.

    Args:
        loss_fn: a `LossWarmupWrapper`, or a module that holds some.
        log: whether to log.
        prefix: of the logged names.
        resume_from: the checkpoint directory that training resumes from; None for
            `checkpoint-<step>` in the output directory.
        reset_at_start: False leaves queues, temperatures and schedule as they are when training
            starts at step 0, such as a queue that was loaded or filled by hand. (The schedule then
            counts from step 0 on; a wrapper that has switched before does not switch again.)

    Raises:
        ValueError: there is no wrapper.
        FileNotFoundError: at the start of training, if it resumes and the checkpoint has no state
            of the loss for this number of processes.

    Example:
        >>> from proxy_losses.integrations.huggingface import LossScheduleCallback
        >>> loss_fn = LossWarmupWrapper(
        ...     torch.nn.CrossEntropyLoss(), SmoothAPLoss(num_classes=4), warmup_steps=500
        ... )
        >>> callback = LossScheduleCallback(loss_fn)
        >>> # Trainer(compute_loss_func=make_compute_loss(loss_fn), callbacks=[callback], ...)
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        *,
        log: bool = True,
        prefix: str = "loss_schedule/",
        resume_from: str | os.PathLike[str] | None = None,
        reset_at_start: bool = True,
    ) -> None:
        check_flag("reset_at_start", reset_at_start)
        self.loss_fn = loss_fn
        self.log_values = log
        self.prefix = prefix
        self.resume_from = resume_from
        self.reset_at_start = reset_at_start
        self._wrappers = find_wrappers(loss_fn)
        self._next_epoch = 0
        self._resumed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the loss to the device; start it anew or, when resuming, read its state."""
        self.loss_fn.to(args.device)
        self._next_epoch = int(state.epoch or 0)
        self._resumed = state.global_step > 0
        if self._resumed:
            path = self._file(args, self.resume_from or _checkpoint(args, state))
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"no state of the loss at {path}; give LossScheduleCallback the checkpoint as "
                    "resume_from, and resume with as many processes as it was saved by"
                )
            self.loss_fn.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif self.reset_at_start:
            reset_losses(self.loss_fn)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the epoch of every wrapper."""
        for wrapper in self._wrappers.values():
            # An epoch that is resumed midway has begun before, with what that does to the queue.
            if not (self._resumed and wrapper._epoch == self._next_epoch):
                wrapper.on_train_epoch_start(self._next_epoch)
        self._next_epoch += 1
        self._resumed = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step of every wrapper."""
        for wrapper in self._wrappers.values():
            wrapper.on_train_batch_start(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the schedules to what is logged."""
        if self.log_values:
            values = progress(self._wrappers, self.prefix)
            kwargs["logs"].update(values)
            state.log_history[-1].update(values)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the state of the loss beside the model's."""
        if state.is_hyper_param_search:  # these checkpoints lie elsewhere and are not resumed
            return
        if args.should_save or own_queue_losses(self.loss_fn):
            directory = _checkpoint(args, state)
            os.makedirs(directory, exist_ok=True)
            torch.save(self.loss_fn.state_dict(), self._file(args, directory))

    def _file(self, args: TrainingArguments, directory: str | os.PathLike[str]) -> str:
        own = args.world_size > 1 and own_queue_losses(self.loss_fn)
        name = f"loss_state_{args.process_index}_of_{args.world_size}" if own else "loss_state"
        return os.path.join(directory, name + ".pt")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    assert args.output_dir is not None
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
