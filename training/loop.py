"""Training and testing: the loop over epochs, and the state of a run."""

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import measuring
from measuring import report
from spiking import SpikingNetwork
from training import checkpoint, checkpoint_checks, console, logs, randomness, recording, run_info, schedule
from training.data import Dataset, TestBatches, TrainingBatches
from training.errors import DivergedError, Interrupted, Refusal
from training.evaluation import images_at_a_time, in_memory, store_report
from training.experiment import Experiment
from training.files import json_files
from training.interrupt import Signals, StopRequested
from training.methods import METHODS
from training.options import arguments
from training.ranks import Ranks
from training.step import TrainingStep, autocast, set_precision

BAR_SECONDS = 0.5  # between updates of the progress bar, which wait for the device


def _bar(batches: Iterable[tuple[Tensor, Tensor]], what: str, **settings: Any) -> tqdm:
    """The batches, with a progress bar on a terminal; the bar disappears at the end."""
    return tqdm(batches, desc=what, leave=False, disable=not sys.stderr.isatty(), **settings)


class Trainer:
    """Trains a network, from its checkpoint if there is one, or tests it.

    Args:
        experiment: the experiment, for its data sets and test batch size.
        options: the parsed command line.
        network: on ``options.device``; maps images to spike counts [N, classes].
        optimizers: all of them step after each backward pass.
        dataset: the images, on any device.
        store: the run's checkpoints, with the one to resume from.
        ranks: the processes that train the run together; None for one.

    Raises:
        Refusal: a batch is larger than the training set, or the checkpoint does not fit or was made with other data.
    """

    def __init__(
        self,
        experiment: Experiment,
        options: Namespace,
        network: SpikingNetwork,
        optimizers: list[Optimizer],
        dataset: Dataset,
        store: checkpoint.Store,
        ranks: Ranks | None = None,
    ):
        self.experiment, self.options, self.network, self.optimizers = experiment, options, network, optimizers
        self.store, self.folder, self.ranks = store, logs.log_folder(options), ranks
        self.writes = ranks is None or ranks.first
        self.fingerprint = dataset.fingerprint()
        device = options.device
        source = experiment.dataset(options.dataset)
        normalisation = source.normalisation(device)
        self.generator = torch.Generator("cpu").manual_seed(options.seed)
        self.training = TrainingBatches(
            dataset.train.to(device),
            options.batch_size,
            source.augmentation,
            normalisation,
            self.generator,
            options.compile,
            share=slice(None) if ranks is None else ranks.share(options.batch_size),
        )
        test = dataset.test if ranks is None else dataset.test.part(ranks.share(len(dataset.test)))
        self.test_set = TestBatches(test.to(device), images_at_a_time(experiment, options), normalisation)
        set_precision(options.precision_used, device)
        network.fused = options.compile
        self.schedule = schedule.build(options, optimizers, options.epoch * len(self.training))
        self.training_step = TrainingStep(
            network,
            optimizers,
            options.precision_used,
            device,
            graph=options.compile,
            changing=self.schedule.changes,
            make=self.training.make,
            ranks=ranks,
        )
        self.weights = measuring.prunable(network)
        self.never_pruned = sum(p.numel() for p in network.parameters()) - sum(w.numel() for w in self.weights.values())
        self.epoch, self.step, self.best_accuracy = 0, 0, 0.0
        self.masks = measuring.masks(network)
        self.lengths: dict[str, int] = {}  # of the log files, at the checkpoint
        self._begin_epoch()
        self.first_step = 0  # of this process
        self.time_left = console.TimeLeft(
            options.epoch, len(self.training), options.interval_test, wait=lambda: float(self.loss)
        )
        if store.saved is not None:
            self._restore(store.saved)

    # -- the state -----------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        """Resets the counters of an epoch, and keeps the random state from which its order is drawn."""
        self.position = 0
        self.order_state = self.generator.get_state()
        self.loss = torch.zeros((), dtype=torch.float64, device=self.options.device)
        self.right = torch.zeros((), dtype=torch.int64, device=self.options.device)
        self.seconds = {"train": 0.0, "test": 0.0, "checkpoint": 0.0}

    def _state(self) -> dict[str, Any]:
        return {
            "format": checkpoint.FORMAT,
            "arguments": arguments(self.options),
            "versions": checkpoint.versions(),
            "data": self.fingerprint,
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "best_accuracy": self.best_accuracy,
            "epoch_loss": float(self.loss),
            "epoch_right": int(self.right),
            "seconds": self.seconds,
            "masks": {name: measuring.pack(mask) for name, mask in self.masks.items()},
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": randomness.states(self.options.device, self.order_state),
            "schedule": self.schedule.state(),
            "files": self.lengths,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        """Loads a checkpoint; for a test, only the network and the counters."""
        if saved["data"] != self.fingerprint:
            if not self.options.test:
                text = f"the run was made with other data ({saved['data']}), not {self.fingerprint}"
                raise Refusal(f"argument --dataset-dir: {text}")
            print(f"Testing with other data ({self.fingerprint}) than the run was made with ({saved['data']}).")
        with checkpoint.checking(self.store.source):
            checkpoint_checks.check_network(saved, self.network)
            if not self.options.test:
                self.schedule.restore(saved["step"], saved["schedule"])
                checkpoint_checks.check_training(saved, self.network, self.optimizers)
                randomness.set_states(saved["random"], self.options.device, self.generator)
        self.network.load_state_dict(saved["network"])
        self.epoch, self.step, self.best_accuracy = saved["epoch"], saved["step"], saved["best_accuracy"]
        if self.options.test:
            self.position = saved["position"]
            return
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            checkpoint.load_optimizer(optimizer, state)
        self.masks = {name: measuring.unpack(saved["masks"][name], weight) for name, weight in self.weights.items()}
        self.lengths = saved["files"]
        self._begin_epoch()
        self.position, self.first_step = saved["position"], self.step
        self.loss += saved["epoch_loss"]
        self.right += saved["epoch_right"]
        self.seconds = saved["seconds"]

    def _save(self) -> None:
        """Saves the state in the background. Raises DivergedError instead if something is not finite."""
        self._check_finite()
        if self.ranks is not None:
            self.ranks.check_in_step(self._same_on_all_ranks())
        start = time.perf_counter()  # the check has waited for the device, which is part of the training
        self.lengths = self.recorder.lengths()
        self.store.save(self._state(), [self.folder / name for name in self.lengths])
        self.saved_at = time.monotonic()
        self.seconds["checkpoint"] += time.perf_counter() - start

    def _same_on_all_ranks(self) -> list[Tensor]:
        noise = [torch.get_rng_state()]
        if self.options.device.type == "cuda":
            noise.append(torch.cuda.get_rng_state(self.options.device))
        return [*self.network.state_dict().values(), *noise]

    def _check_finite(self) -> None:
        """Raises DivergedError if something was not finite, and writes the indices of that batch's images to a file."""
        found = self.training_step.finite.found()
        if found is None:
            return
        step = self.first_step + found.step
        epoch, position = divmod(step, len(self.training))
        where = self.folder / f"diverged-epoch-{epoch + 1}-step-{step}.json"
        indices = self.training.indices(position).tolist()
        if self.writes:
            json_files.write(where, {"epoch": epoch + 1, "step": step, "what": found.what, "indices": indices})
        raise DivergedError(
            f"{found.what} is not finite since epoch {epoch + 1}, step {step}; the checkpoint is older. "
            f"The indices of that batch's images are in {where}"
        )

    # -- training ------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains until ``-N`` epochs are done. Saves every --checkpoint-minutes, and as :meth:`_save_after_epoch` says.

        Raises:
            Interrupted: a signal stopped the run; it is saved.
            DivergedError: something is not finite; the last checkpoint is older.
            OSError: logs or a checkpoint cannot be written; the last checkpoint is intact.
        """
        epochs = self.options.epoch
        if self.epoch >= epochs:
            done = console.counted(epochs, "epoch")
            print(f"The run has finished its {done}. Extend it with a larger -N, or evaluate it with -test.")
            return
        print("\n".join(console.first_lines(self.options, self.folder, self.store.folder)), flush=True)
        if self.step:
            print(f"Resuming {self._place()}; {console.counted(epochs, 'epoch')} in all.")
        if self.store.saved is None:  # before anything is logged: logs without a checkpoint could not be resumed
            start = time.perf_counter()
            self.store.save(self._state(), [])
            self.store.wait()
            self.seconds["checkpoint"] += time.perf_counter() - start
        with Signals() as self.signals, self._new_recorder() as self.recorder:
            about = run_info.describe(self.options, self.network, checkpoint.versions())
            if self.writes:
                path = self.folder / logs.INFO
                before = run_info.earlier(self.folder, about) if self.step else []
                json_files.write(path, {**about, "before": before})
            self.saved_at = time.monotonic()
            if not self.lengths:
                self.recorder.describe(about["command"], about["arguments"])
            try:
                while self.epoch < epochs:
                    self._train_epoch()
                    self._end_epoch()
                self.store.wait()
            except StopRequested as stop:
                self._save()
                self.store.wait()
                raise Interrupted(stop.number, self._place()) from None
        print(f"Logs are in {self.folder}, the model in {self.store.folder}.")
        if complaint := self.schedule.complaint(measuring.total(measuring.count(self.masks)).connectivity):
            print(complaint)

    def _new_recorder(self) -> recording.Recorder | recording.SilentRecorder:
        if self.writes:
            return recording.Recorder(self.folder, self.lengths, self.never_pruned > 0)
        return recording.SilentRecorder()

    def _place(self) -> str:
        """The position of the run, in words."""
        if self.position:
            return f"in epoch {self.epoch + 1}, after step {self.position} of {len(self.training)}"
        return f"after epoch {self.epoch}"

    def _train_epoch(self) -> None:
        """Trains from the current position to the end of the epoch."""
        shown = time.perf_counter()  # when the bar was last updated
        earlier = self.seconds["train"] + self.seconds["checkpoint"] - shown
        self.network.train()
        bar = _bar(
            self.training.parts(self.position),
            f"epoch {self.epoch + 1}/{self.options.epoch}",
            total=len(self.training),
            initial=self.position,
        )
        self.time_left.start()
        with bar:
            for batch in bar:
                self.schedule.advance(self.step)
                loss, right = self.training_step(*batch)
                self.loss += loss
                self.right += right
                if self.step % self.options.interval_train == 0:  # the host waits for the device here
                    self._check_finite()
                    with self.recorder.step(self.step) as record:
                        record("batch_loss", float(loss))
                        record("batch_accuracy", int(right) / self.options.batch_size)
                if not bar.disable and time.perf_counter() - shown > BAR_SECONDS:  # and here
                    accuracy = int(right) / self.options.batch_size
                    bar.set_postfix(loss=f"{float(loss):.4f}", accuracy=f"{accuracy:.3f}", refresh=False)
                    shown = time.perf_counter()
                self.step += 1
                self.position += 1
                self.seconds["train"] = earlier + time.perf_counter() - self.seconds["checkpoint"]
                self._stop_or_save()
                if self.time_left.step():
                    tqdm.write(self.time_left.line(self.epoch, self.position, self.options))
                    sys.stdout.flush()
        self._check_finite()  # and here
        self.seconds["train"] = earlier + time.perf_counter() - self.seconds["checkpoint"]
        self.time_left.trained()

    def _stop_or_save(self) -> None:
        """Stops or saves if a signal asks for it; saves if a checkpoint is due."""
        due, asked = self._due(), self.signals.save
        if self.ranks is None:
            self.signals.check()
        else:
            due, asked = self._agreed(due and self.writes, asked)
        if due or asked:
            self.signals.save = False
            self._save()
            if asked:
                self.store.wait()
                print(f"Saved {self._place()}, as requested by SIGUSR1; continuing.", flush=True)

    def _agreed(self, *here: bool) -> list[bool]:
        """For each thing that is so here, whether it is on any rank. All ranks stop here if a signal asks one to."""
        stop, *anywhere = self.ranks.largest(self.signals.stop or 0, *here)
        if stop:
            raise StopRequested(stop)
        return list(map(bool, anywhere))

    def _due(self, ahead: float = 0.0) -> bool:
        """Whether the last checkpoint will be --checkpoint-minutes old in ``ahead`` seconds."""
        return time.monotonic() - self.saved_at + ahead >= 60 * self.options.checkpoint_minutes

    def _save_after_epoch(self, seconds: float) -> None:
        """Saves if the last checkpoint would be too old after another epoch, which takes as many ``seconds``.

        So short epochs are saved at their ends, not within. The last epoch is saved too, and the first one of each
        process: a run that is killed again and again still gets on.
        """
        first = self.step - self.first_step <= len(self.training)  # of this process, which may have resumed within it
        due = first or self.epoch == self.options.epoch or self._due(ahead=seconds)
        if self.ranks is not None:
            (due,) = self._agreed(due and self.writes)
        if due:
            self._save()

    def _end_epoch(self) -> None:
        """Tests and records after an epoch, in full after the first and every -i1 epochs; saves if it is time."""
        start = time.perf_counter()
        epoch = self.epoch + 1
        full = epoch == 1 or epoch % self.options.interval_test == 0
        accuracy, spikes = in_memory(lambda: self._accuracy(full), self.test_set)
        self.best_accuracy = max(self.best_accuracy, accuracy)
        before, self.masks = self.masks, measuring.masks(self.network)
        batches, (group, *_) = len(self.training), self.optimizers[0].param_groups
        self.store.check()  # of a folder that is now another run's: its logs are not to be written
        with self.recorder.epoch(epoch, full) as record:
            record("epoch", epoch)
            record("step", self.step)
            record("train_loss", float(self.loss) / batches)
            record("train_accuracy", int(self.right) / (batches * self.options.batch_size))
            record("test_accuracy", accuracy)
            record("best_accuracy", self.best_accuracy)
            measuring.record_connections(record, measuring.count(self.masks), self.never_pruned)
            measuring.record_rewired(record, measuring.rewired(before, self.masks))
            record("learning_rate", float(group["lr"]))
            record("penalty", group.get(METHODS[self.options.mode].penalty))
            if full:
                measuring.record_neurons(record, spikes.rates())
                recording.record_distributions(record, self.network, self.optimizers, self.experiment.histograms)
            self.seconds["test"] += time.perf_counter() - start
            for what, seconds in self.seconds.items():
                record(f"{what}_seconds", seconds)
            took = sum(self.seconds.values())
            record("epoch_seconds", took)
        self.epoch = epoch
        self._begin_epoch()
        self._save_after_epoch(took)
        self.time_left.tested(full)
        left = self.time_left.left(epoch)
        remaining = "" if left is None else f"  {console.duration(left)} left"
        print(f"epoch {epoch}/{self.options.epoch}  {record.words()}{remaining}", flush=True)

    # -- testing -------------------------------------------------------------------------------------

    def _stoppable(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches until a signal asks to stop; the run then repeats the test when it resumes."""
        for batch in batches:
            if self.ranks is None:
                self.signals.check()
            else:
                self._agreed(True)
            yield batch
        while self.ranks is not None and any(self._agreed(False)):
            pass  # other ranks have batches left

    def _accuracy(self, full: bool) -> tuple[float, measuring.SpikeCounter | None]:
        """The accuracy on the test set and, for a full record, what has counted the spikes."""
        counter = measuring.SpikeCounter(self.network) if full else contextlib.nullcontext()
        with counter as spikes, self._test_bar() as bar:
            found = measuring.evaluate(self.network, self._stoppable(bar))
        if self.ranks is not None:
            self.ranks.sum(found.confusion)
            if full:
                spikes.add_up(self.ranks.sum)
        return found.accuracy, spikes

    @contextlib.contextmanager
    def _test_bar(self) -> Iterator[tqdm]:
        with autocast(self.options.precision_used, self.options.device), _bar(self.test_set, "test") as bar:
            yield bar

    def test(self) -> None:
        """Evaluates the network; prints the results and stores them in the log folder."""
        found = in_memory(self._report, self.test_set)
        if self.position:
            print(f"The checkpoint was saved {self._place()}.")
        store_report(self.folder, found, data=self.fingerprint, precision=self.options.precision_used)

    def _report(self) -> report.Report:
        with self._test_bar() as bar:
            return report.report_on(self.network, bar, self.epoch, self.position)
