"""What a network is and what it costs: connections, spikes, accuracy, energy, paths; each defined once."""

from measuring.classification import Evaluation as Evaluation
from measuring.classification import accuracy as accuracy
from measuring.classification import confusion as confusion
from measuring.classification import correct as correct
from measuring.classification import evaluate as evaluate
from measuring.classification import loss_function as loss_function
from measuring.classification import wilson_interval as wilson_interval
from measuring.connections import Connections as Connections
from measuring.connections import connected as connected
from measuring.connections import count as count
from measuring.connections import pack as pack
from measuring.connections import prunable as prunable
from measuring.connections import record_connections as record_connections
from measuring.connections import record_rewired as record_rewired
from measuring.connections import rewired as rewired
from measuring.connections import total as total
from measuring.connections import unpack as unpack
from measuring.distributions import distribution as distribution
from measuring.spikes import SpikeCounter as SpikeCounter
from measuring.spikes import neuron_results as neuron_results
from measuring.spikes import record_neurons as record_neurons
