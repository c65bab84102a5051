"""Lightning: a callback that drives every `LossWarmupWrapper` of a LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._checks import check_flag, warn_user
from ..distributed import all_gather_no_grad
from ..nn import LossWarmupWrapper, ScheduledLoss
from ._common import find_wrappers, own_queue_losses, progress, reset_losses

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError(
                "proxy_losses.integrations.lightning needs Lightning: "
                "pip install '.[lightning]' in a clone of this library"
            ) from error

_SHARDS = "proxy_losses_shards"  # key in the checkpoint


class LossScheduleCallback(Callback):
    """Drives, logs and checkpoints the loss schedules of a LightningModule.

    Every `LossWarmupWrapper` that is an attribute of the module, or lies in one, is driven: the
    epoch clock is `trainer.current_epoch`, the step clock `trainer.global_step`. The latter counts
    optimizer steps: with gradient accumulation it stands still over the micro-batches of a step,
    so `warmup_steps`, `blend_steps` and `temp_decay_steps` are optimizer steps; with several
    optimizers (manual optimization) Lightning counts the steps of each.

    Checkpoints hold schedule and queue, as part of the module's state_dict; resuming continues
    them, also in the middle of an epoch. So does the same trainer when it fits on.

    A fit from step 0 without a checkpoint is a run of its own: it starts with empty queues and the
    schedule's first step, whatever the module went through before: another fit, a learning-rate
    finder, the sanity check, weights loaded by hand with the queue of the run that they come from.

    Under DistributedDataParallel the buffers of all ranking losses are left out of its broadcast:
    they are equal anyway, or, with distributed="shard" or gather_distributed=False, would be
    overwritten with those of rank 0. Such queues of each process's own are gathered into the
    checkpoint, and dealt out again when training resumes with as many processes; with another
    number they start empty, with a warning.

    Args:
        log: whether to log main_weight, phase (0 warmup, 1 blend, 2 main) and temperature of each
            wrapper at each batch.
        prefix: of the logged names `{prefix}{path of the wrapper}/main_weight` and so on.
        reset_at_start: False leaves queues, temperatures and schedule as they are when a fit
            starts at step 0, such as a queue that was loaded or filled by hand. (The schedule then
            counts from step 0 on; a wrapper that has switched before does not switch again.)

    Raises:
        ValueError: at the start of fit, if there is no wrapper.
        RuntimeError: at the start of fit, if a loss with such a queue was created too late,
            in ``configure_model`` or `setup`, to be kept out of the broadcast.

    Example:
        >>> from proxy_losses.integrations.lightning import LossScheduleCallback
        >>> callback = LossScheduleCallback(prefix="train/")
        >>> # Trainer(callbacks=[callback]).fit(module)
    """

    def __init__(self, *, log: bool = True, prefix: str = "", reset_at_start: bool = True) -> None:
        super().__init__()
        check_flag("reset_at_start", reset_at_start)
        self.reset_at_start = reset_at_start
        self.log_values = log
        self.prefix = prefix
        self._wrappers: dict[str, LossWarmupWrapper] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew; keep the buffers of the losses out of the broadcast, before it is set up."""
        if stage == "fit":  # a checkpoint is loaded later
            self._start(trainer, pl_module)
        names = set(getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()))
        names |= _buffer_names(pl_module)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the wrappers."""
        self._wrappers = find_wrappers(pl_module)
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            left_out = wrapped.parameters_to_ignore
            late = [n for n in own_queue_losses(pl_module) if f"{n}._tau" not in left_out]
            if late:
                raise RuntimeError(
                    f"{', '.join(late)}: a loss with a queue of each process's own must exist "
                    "before training is set up; create it in __init__ of the LightningModule"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, without what the sanity check stored and other hooks loaded."""
        if not trainer.ckpt_path:
            self._start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch of every wrapper."""
        for wrapper in self._wrappers.values():
            wrapper.on_train_epoch_start(trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the step of every wrapper, and log."""
        for wrapper in self._wrappers.values():
            # A resumed run may enter an epoch without its hook.
            if wrapper._epoch != trainer.current_epoch:
                wrapper.on_train_epoch_start(trainer.current_epoch)
            wrapper.on_train_batch_start(trainer.global_step)
        if self.log_values:
            pl_module.log_dict(
                progress(self._wrappers, self.prefix), on_step=True, on_epoch=False, batch_size=1
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the queues of the other processes."""
        shards = own_queue_losses(pl_module)
        if trainer.world_size > 1 and shards:  # every process comes here
            checkpoint[_SHARDS] = {path: _gather_queue(loss) for path, loss in shards.items()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the queue of this process."""
        saved = checkpoint.get(_SHARDS, {})
        for path, loss in own_queue_losses(pl_module).items():
            queues = saved.get(path)
            size = len(queues["_q_logits"]) if queues else 1
            if loss._queue is None:
                continue
            if size != trainer.world_size:
                warn_user(
                    f"{path}: the checkpoint holds queues of {size} processes, "
                    f"not {trainer.world_size}; they start empty"
                )
                loss.reset_queue()
            elif queues:
                own = {name: stack[trainer.global_rank] for name, stack in queues.items()}
                loss._queue.load_state_dict(own)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the wrappers."""
        self._wrappers = {}

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.reset_at_start or trainer.global_step > 0:
            return
        reset_losses(pl_module)
        for module in pl_module.modules():
            if isinstance(module, LossWarmupWrapper):
                # Lightning's finders train without callbacks, at the schedule's first step.
                module.on_train_epoch_start(trainer.current_epoch)
                module.on_train_batch_start(0)


def _buffer_names(root: nn.Module) -> set[str]:
    return {
        f"{path}.{name}" if path else name
        for path, module in root.named_modules()
        if isinstance(module, (ScheduledLoss, LossWarmupWrapper))
        for name, _ in module.named_buffers(recurse=isinstance(module, ScheduledLoss))
    }


def _gather_queue(loss: ScheduledLoss) -> dict[str, Tensor]:
    """[processes, ...] of every saved buffer of the queue that is not empty."""
    if loss._queue is None:
        return {}
    state = {n: x for n, x in loss._queue.state_dict().items() if x.numel()}
    stacks = all_gather_no_grad(*(x[None] for x in state.values()))
    return {n: x.cpu() for n, x in zip(state, stacks, strict=True)}
