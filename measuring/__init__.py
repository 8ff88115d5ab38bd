"""Measures a network: connections, spikes, accuracy, energy and paths. Each is defined once, here."""

from measuring.classification import Evaluation, accuracy, confusion, correct, evaluate, loss_function, wilson_interval
from measuring.connections import (
    Connections,
    connected,
    count,
    masks,
    pack,
    prunable,
    record_connections,
    record_rewired,
    rewired,
    total,
    unpack,
)
from measuring.distributions import distribution
from measuring.spikes import SpikeCounter, neuron_results, record_neurons
