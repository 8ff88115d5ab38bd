"""Training and testing: the loop over epochs, and everything that a run carries along."""

import sys
import time
from argparse import Namespace
from typing import Any

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from spiking import SpikingNetwork
from training import checkpoint, measure, record
from training.data import Dataset, Normalisation, TestBatches, TrainingBatches
from training.options import Recipe, Refusal, arguments
from training.step import TrainingStep, autocast, set_precision


class Run:
    """One run: a network with its optimizers on a data set, trained from where its checkpoint is.

    Args:
        recipe: what the experiment fixes.
        options: the command line, parsed.
        network: with ``T`` time steps, on ``options.device``; maps images to spike counts [N, 10].
        optimizers: all of them take a step after every backward pass.
        dataset: the images, on any device.
        saved: the checkpoint to go on from; None starts afresh.

    Raises:
        Refusal: a batch is larger than the training set, or the checkpoint was made with other data.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: Namespace,
        network: SpikingNetwork,
        optimizers: list[Optimizer],
        dataset: Dataset,
        saved: dict[str, Any] | None,
    ):
        self.recipe, self.options, self.network, self.optimizers = recipe, options, network, optimizers
        self.fingerprint = dataset.fingerprint()
        device = options.device
        normalisation = Normalisation(recipe.mean, recipe.std, device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.training = TrainingBatches(
            dataset.train.to(device),
            options.batch_size,
            recipe.augmentation,
            normalisation,
            self.generator,
            fused=options.compile,
        )
        self.test_set = TestBatches(dataset.test.to(device), recipe.test_batch_size, normalisation)
        set_precision(options.precision_used, device)
        network.fused = options.compile
        self.training_step = TrainingStep(network, optimizers, options.precision_used, device, graph=options.compile)
        self.weights = measure.prunable(network)
        self.others = sum(p.numel() for p in network.parameters()) - sum(w.numel() for w in self.weights.values())
        self.epoch, self.step, self.best_accuracy = 0, 0, 0.0
        self.masks = self._masks()
        if saved is not None:
            self._restore(saved)

    def _masks(self) -> dict[str, torch.Tensor]:
        return {name: measure.connected(weight) for name, weight in self.weights.items()}

    def _state(self) -> dict[str, Any]:
        return {
            "format": checkpoint.FORMAT,
            "arguments": arguments(self.options),
            "versions": checkpoint.versions(),
            "data": self.fingerprint,
            "epoch": self.epoch,
            "step": self.step,
            "best_accuracy": self.best_accuracy,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": checkpoint.random_states(self.options.device, self.generator),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["data"] != self.fingerprint and not self.options.test:
            raise Refusal(
                f"argument --dataset-dir: the run was made with other data ({saved['data']}), not {self.fingerprint}"
            )
        self.network.load_state_dict(saved["network"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            checkpoint.load_optimizer(optimizer, state)
        checkpoint.set_random_states(saved["random"], self.options.device, self.generator)
        self.epoch, self.step, self.best_accuracy = saved["epoch"], saved["step"], saved["best_accuracy"]
        self.masks = self._masks()  # the checkpoint is of an epoch's end

    def train(self) -> None:
        """Trains until ``-N`` epochs are done, with a checkpoint after each."""
        epochs, folder = self.options.epoch, record.folder_of(self.options)
        if self.epoch >= epochs:
            print(f"The run has finished its {epochs} epochs; a greater -N prolongs it, -test evaluates it.")
            return
        if self.epoch:
            print(f"Going on after epoch {self.epoch} of {epochs}.")
        recorder = record.Recorder(folder, self.step)
        while self.epoch < epochs:
            start = time.perf_counter()
            self._train_epoch(recorder)
            self.epoch += 1
            accuracy = self._test_and_record(recorder)
            line = record.epoch_line(
                self.epoch,
                epochs,
                accuracy,
                self.best_accuracy,
                measure.total(measure.count(self.masks)),
                time.perf_counter() - start,
            )
            checkpoint.save(checkpoint.path_of(self.options), self._state())
            print(line, flush=True)
        recorder.close()
        print(f"Logs are in {folder}, the model in {checkpoint.path_of(self.options).parent}.")

    def _train_epoch(self, recorder: record.Recorder) -> None:
        bar_seconds = 0.5
        recorded = []  # on the device until the end of the epoch
        self.network.train()
        bar = tqdm(
            self.training,
            desc=f"epoch {self.epoch + 1}/{self.options.epoch}",
            leave=False,
            disable=not sys.stderr.isatty(),
        )
        shown = time.perf_counter()
        for images, labels in bar:
            loss, right = self.training_step(images, labels)
            if self.step % self.options.interval_train == 0:
                recorded.append((self.step, loss.clone(), right.clone()))
            if not bar.disable and time.perf_counter() - shown > bar_seconds:  # here the host waits for the device
                accuracy = int(right) / len(labels)
                bar.set_postfix(loss=f"{float(loss):.4f}", accuracy=f"{accuracy:.3f}", refresh=False)
                shown = time.perf_counter()
            self.step += 1
        for step, loss, right in recorded:
            recorder.training(step, float(loss), int(right) / self.options.batch_size)

    def _test_and_record(self, recorder: record.Recorder) -> float:
        """Tests after an epoch and records; in full after the first epoch and every -i1 epochs."""
        full = self.epoch == 1 or self.epoch % self.options.interval_test == 0
        if full:
            with measure.SpikeCounter(self.network) as spikes:
                accuracy = self._accuracy()
            recorder.neurons(self.epoch, spikes.rates())
            recorder.weights(self.epoch, self.network, self.optimizers, self.recipe.histograms)
        else:
            accuracy = self._accuracy()
        self.best_accuracy = max(self.best_accuracy, accuracy)
        before, self.masks = self.masks, self._masks()
        recorder.accuracy(self.epoch, accuracy)
        recorder.connections(self.epoch, measure.count(self.masks), measure.rewired(before, self.masks), self.others)
        recorder.flush()
        return accuracy

    def _accuracy(self) -> float:
        with autocast(self.options.precision_used, self.options.device):
            return measure.accuracy(self.network, self.test_set)

    def test(self) -> None:
        """Evaluates the network as it is; prints the results and stores them in the log folder."""
        with measure.SpikeCounter(self.network) as spikes:
            accuracy = self._accuracy()
        record.report_test(
            record.folder_of(self.options), self.epoch, accuracy, measure.count(self.masks), spikes.rates()
        )
