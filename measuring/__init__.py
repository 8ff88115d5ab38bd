"""What a network is and what it costs: connections, spikes, accuracy, energy, paths; each defined once."""

from measuring.classification import Evaluation, accuracy, confusion, correct, evaluate, loss_function, wilson_interval
from measuring.connections import (
    Connections,
    connected,
    count,
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
