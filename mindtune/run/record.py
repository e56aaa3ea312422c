"""The record of a run: its output directory, checkpoints, logs, progress bar and interruption.

A script calls a `Run`; a `Run` never calls the training step, the optimizer or the batches. Only the main process
writes.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import mindspore as ms
import numpy as np
from tqdm import tqdm

from mindtune.cli import StopRequest, UserError, print_lines
from mindtune.distributed import ranks
from mindtune.models.execution import free_memory
from mindtune.run import checkpoint, hub, memory, plan, report, tracking
from mindtune.run.progress import Progress

# What every run writes besides its result, checkpoints and samples.
FILES = ("run.json", report.REPORT_FILE, "metrics.jsonl", "loss_by_timestep.csv", "loss_by_timestep.png")


class Settings(NamedTuple):
    """Where and how a run is recorded. The fields have the names of the flags."""

    output_dir: str
    pretrained_model_name_or_path: str
    overwrite_output_dir: bool = False
    resume_from_checkpoint: Optional[str] = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: Optional[int] = None
    logging_dir: str = "logs"
    report_to: str = "none"
    seed: Optional[int] = None
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 1
    max_train_steps: Optional[int] = None
    push_to_hub: bool = False
    hub_model_id: Optional[str] = None
    hub_token: Optional[str] = None
    hub: str = "huggingface"


class Run:
    """One run, new or resumed.

    Call order: `set_data`, `resume`, `start`; in the loop `stopped`, `update`, `due`, `save`; `stop` or `finish`.

    `flags` are recorded in run.json. `results` are the names of the files that a finished run leaves in the output
    directory; the last of them marks it as finished. `defaults` are those of the flags. Creating a `Run` checks the
    output directory, the logging services and the hub, and writes nothing. Raises UserError.
    """

    def __init__(
        self, settings: Settings, flags: dict[str, Any], results: tuple[str, ...], defaults: Optional[dict] = None
    ) -> None:
        self.started = time.time()
        self.settings = settings
        self.flags = flags
        self.files = (*FILES, *results)
        self.services = tracking.services(settings.report_to)
        self.output_dir, self.checkpoint = checkpoint.open_output_dir(
            settings.output_dir,
            settings.resume_from_checkpoint,
            settings.overwrite_output_dir,
            self.files,
            results[-1],
        )
        ranks.require_same(str(self.checkpoint), "--output_dir: the checkpoint to resume from")
        self.logging_dir = self.output_dir / settings.logging_dir
        self.state = checkpoint.trainer_state(self.checkpoint, defaults or {})
        self.gallery: list[tuple[str, str]] = []  # prompts and image files of the model card
        wanted = (settings.hub_model_id, settings.output_dir, settings.hub_token, settings.hub)
        self.hub_id = ranks.on_main_process(hub.check, *wanted) if settings.push_to_hub else None
        seed = settings.seed if settings.seed is not None else self.state.get("seed", secrets.randbelow(2**31))
        self.seed = ranks.all_gather(seed)[0]
        self.step = self.state.get("global_step", 0)
        self.progress = Progress()
        self.skipped = 0
        self.tracker: Optional[tracking.Tracker] = None
        self.curve: Optional[tracking.LossByTimestep] = None

    # ---- before the loop ---------------------------------------------------------------------

    def set_data(self, data: Any) -> None:
        """Computes the length of the run from its data, an ImageData or PairData."""
        settings = self.settings
        self.data = data
        self.batches_per_update = settings.gradient_accumulation_steps * ranks.world_size()
        self.samples_per_update = settings.train_batch_size * self.batches_per_update
        updates = settings.num_train_epochs * data.epoch_length / self.samples_per_update
        self.max_train_steps = settings.max_train_steps or math.ceil(updates)

    def resume(self, fixed: dict[str, Any], base: str, state: dict[str, ms.Parameter]) -> None:
        """Loads the parameters `state` from the checkpoint, if there is one. Raises UserError if it has others.

        `fixed` are the flags with `may_change=False`, and `base` is a hash of the base model. The run continues exactly
        only if both are as before; those that differ are printed.
        """
        self.training_state = state
        self.identity = {
            "seed": self.seed,
            "data": self.data.fingerprint(),
            "base": base,
            "samples_per_update": self.samples_per_update,
            **fixed,
        }
        if len(self.data.sizes) > 1:  # the samples of a batch are of one bucket, so its size decides which
            self.identity["batch_size"] = self.settings.train_batch_size
        if not self.checkpoint:
            return
        other_ranks = itertools.chain(*ranks.all_gather(list(state)))
        checkpoint.load_state(self.checkpoint / "training_state.safetensors", state, other_ranks)
        changed = [name for name, value in self.identity.items() if self.state.get(name) != value]
        if changed:
            print(f"resuming with other values of {', '.join(changed)} than the checkpoint: not its exact continuation")
        for path in ranks.on_main_process(checkpoint.set_aside_later, self.output_dir, self.checkpoint) or ():
            print(f"a checkpoint after this one was renamed to {path.name}")
        print(f"resuming from {self.checkpoint.name} after update {self.step}")

    def start(
        self,
        settings: memory.Settings,
        schedule_length: int,
        trainable: dict[str, int],
        write_weights: Callable[[Path], Any],
        axis: str = "sigma",
    ) -> None:
        """Prints a summary, opens the logs, and handles Ctrl-C from here on.

        `settings` are those of the memory plan, for run.json. `trainable` is the number of trained parameters per
        model. `write_weights(folder)` writes the weights of a checkpoint. `axis` names the x axis of the plot of
        held-out losses: sigma or timestep.
        """
        self.memory_settings = settings
        self.schedule_length = schedule_length
        self.write_weights = write_weights
        self.axis = axis
        self.record = {
            "system": settings.system,
            "flags": self.flags,
            "seed": self.seed,
            "versions": tracking.package_versions(),
            "device": ms.get_context("device_target"),
            "data": {"fingerprint": self.identity["data"], **self.data.facts()},
            "trainable": trainable,
            "workers": ranks.world_size(),
        }
        self._print_summary()
        parts = ranks.all_gather([(name, parameter.nbytes) for name, parameter in self.training_state.items()])
        self.state_bytes = sum(dict(itertools.chain(*parts)).values())  # with ZeRO a rank has names of its own
        if ranks.is_main_process():
            self._open_files()
        self.stop_request = StopRequest()

    def batch_range(self) -> tuple[int, int]:
        """(first, end): the numbers of the batches left to train on, of all ranks; `end` is not included."""
        return self.step * self.batches_per_update, self.max_train_steps * self.batches_per_update

    def _print_summary(self) -> None:
        optimizer = sum(p.nbytes for name, p in self.training_state.items() if name.startswith("optimizer."))
        print(f"optimizer state: {optimizer:,} bytes per device")
        epochs = self.max_train_steps * self.samples_per_update / self.data.epoch_length
        print(
            f"{self.data.epoch_length:,} samples per epoch, {len(self.data.held_out)} held out; batch size "
            f"{self.settings.train_batch_size} x {self.settings.gradient_accumulation_steps} accumulation steps x "
            f"{ranks.world_size()} devices; {self.max_train_steps} updates, {epochs:.1f} epochs; seed {self.seed}"
        )

    def _open_files(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.settings.overwrite_output_dir and not checkpoint.belongs_to(self.checkpoint, self.output_dir):
            checkpoint.remove_old_run(self.output_dir, self.logging_dir, self.files)
        saved = self.state_bytes + 4 * sum(self.record["trainable"].values())
        every, limit = self.settings.checkpointing_steps, self.settings.checkpoints_total_limit
        checkpoint.require_space(self.output_dir, saved, self.max_train_steps - self.step, every, limit)
        tracking.write_run_json(self.output_dir / "run.json", **self.record, finished=False)
        self.tracker = tracking.Tracker(self.output_dir, self.logging_dir, self.services, self.step, self.flags)
        self.curve = tracking.LossByTimestep(self.output_dir, self.step, self.axis)

    # ---- in the loop -------------------------------------------------------------------------

    def stopped(self) -> bool:
        """Whether Ctrl-C or SIGTERM has asked any rank to stop. Also starts the clock of the next update."""
        stopped = any(ranks.all_gather(self.stop_request.exit_code))
        self.progress.begin(self.step, self.max_train_steps)
        return stopped

    def update(self, losses: list[float], *, lr: float, grad_norm: Any, **values: float) -> None:
        """Counts an update and logs `values` and the mean of `losses`, one per micro-batch of this rank.

        Raises UserError if the loss or gradient norm is not finite, unless it is an overflow: a loss_scale above 1.
        """
        loss = float(np.mean(ranks.all_gather(losses)))
        self.step += 1
        logged = {"loss": loss, "lr": lr, "grad_norm": float(grad_norm), **values}
        if not math.isfinite(loss + logged["grad_norm"]):
            self._skip(logged)
            logged = {name: value for name, value in logged.items() if math.isfinite(value)}
        if self.tracker:
            self.tracker.log(self.step, **logged)
        self.progress.end(loss, lr)

    def _skip(self, logged: dict[str, float]) -> None:
        """Counts an update that fp16's loss scaler skipped. Raises UserError if the loss scale is not the cause."""
        self.skipped += 1
        if logged.get("loss_scale", 0.0) > 1.0:
            tqdm.write(f"update {self.step}: overflow in fp16, skipped; loss scale {logged['loss_scale']:g}")
            return
        self.progress.close()
        # A checkpoint of the previous update has the weights that gave this loss, so it may be bad too.
        good = (p for p in checkpoint.checkpoints(self.output_dir) if checkpoint.step_of(p) < self.step - 1)
        last = max(good, key=checkpoint.step_of, default="(none yet)")
        raise UserError(
            f"update {self.step}: the loss is {logged['loss']}, the gradient norm {logged['grad_norm']}. This update "
            f"was not saved; the last good checkpoint is {last}. Try a lower --learning_rate, or bf16 instead of fp16."
        )

    def due(self, every: float) -> bool:
        """Whether the last update reached a multiple of `every`. Never at the end of the run, which always saves."""
        return self.step < self.max_train_steps and self.step // every > (self.step - 1) // every

    def save(self) -> None:
        """Writes a checkpoint after this update. All ranks must call it."""
        state = ranks.gather_parameters(self.training_state)
        if self.tracker is not None:
            self._save(state)
        free_memory()  # saving leaves many small free blocks

    def _save(self, state: dict[str, np.ndarray]) -> None:
        if self.step >= self.max_train_steps:
            self.progress.close()
        self.tracker.flush()

        def write(folder: Path) -> None:
            self.write_weights(folder)
            checkpoint.save_state(folder / "training_state.safetensors", state)
            trainer_state = {"global_step": self.step, "lr_schedule_steps": self.schedule_length, **self.identity}
            (folder / "trainer_state.json").write_text(json.dumps(trainer_state))

        limit = self.settings.checkpoints_total_limit
        self.saved = checkpoint.save_checkpoint(self.output_dir, self.step, write, limit)

    # ---- after the loop ----------------------------------------------------------------------

    def stop(self) -> int:
        """Ends a run that was interrupted, after `save`. Returns 130, the exit code that shells use for Ctrl-C."""
        if ranks.is_main_process():
            self.progress.close()
            self._write_run_json(finished=False)
            report.write_report(self.output_dir)
            print(f"saved {self.saved} after update {self.step}. To continue, add --resume_from_checkpoint latest")
        ranks.finish()
        return 130

    def finish(self, name: str, result: Path, images: Optional[Path]) -> int:
        """Ends a finished run: plot, report, upload. `name` describes `result` in messages. Returns the exit code 0."""
        if ranks.is_main_process():
            plot = self.curve.plot()
            self.tracker.close()
            self._write_run_json(finished=True)
            written = {
                name: result,
                "validation images": images,
                "held-out loss plot": plot,
                "curves": self.logging_dir if self.services else self.output_dir / "metrics.jsonl",
                "report": report.write_report(self.output_dir),
            }
            print_lines(f"{what}: {path}" for what, path in written.items() if path)
            if self.hub_id:
                base, token = self.settings.pretrained_model_name_or_path, self.settings.hub_token
                address = hub.push(self.hub_id, self.output_dir, base, self.gallery, token, self.settings.hub)
                print(f"uploaded to {address}")
        ranks.finish()
        return 0

    def _write_run_json(self, finished: bool) -> None:
        seconds = self.progress.median()
        tracking.write_run_json(
            self.output_dir / "run.json",
            **self.record,
            finished=finished,
            updates=self.step,
            skipped_updates=self.skipped,
            seconds_per_step=seconds and seconds / self.settings.gradient_accumulation_steps,
            seconds_total=time.time() - self.started,
            seconds_to_first_update=self.progress.first(),
            peak_memory_mb=tracking.peak_memory_mb(),
            memory=plan.measured(self.memory_settings),
        )
