"""Every number that the program records: one table, from which files, console and docs/metrics.md come.

To add a number, add an entry to :data:`METRICS` and record it in one line: ``record("my_number", value)``, or
``record("my_number", value, layer=name)`` for each layer. Then ``make docs`` writes the tables of docs/metrics.md anew.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from measuring.energy import PICOJOULES_PER_AC as AC
from measuring.energy import PICOJOULES_PER_MAC as MAC
from measuring.report import percent
from training.logs import RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
STEP, EPOCH, FULL, TEST, GRID = "step", "epoch", "full", "test", "grid"  # when a number is recorded
FILES = {EPOCH: RESULTS, FULL: RESULTS, TEST: "test.json", GRID: "rows.csv"}
SHARE, SECONDS, DISTRIBUTION = "share", "s", "distribution"  # units that are written in a way of their own
FORMATS = {SHARE: percent, SECONDS: lambda seconds: f"{seconds:.1f} s"}
ENERGY = f"{MAC:g} · MACs + {AC:g} · SynOps"
LAYERS, NEURONS, DISTRIBUTIONS = "layers/{layer}/{key}", "neurons/{layer}/{key}", "distributions/{layer}/{key}"


@dataclass(frozen=True)
class Metric:
    """A number: what it means, and where it is written.

    With ``{layer}`` in its path or tag, the name of a weight or of a LIF layer, it is recorded for each layer.
    """

    key: str  # its name in the code
    unit: str  # as on the page; a number without a unit has an empty one
    when: tuple[str, ...]  # STEP etc.: whenever one of these is recorded, the number must be, unless it is optional
    definition: str  # in Markdown, as the formula
    formula: str = "–"
    path: str = "{key}"  # the keys that lead to it in the file of ``when``; empty for a number that is not in it
    tag: str = ""  # in TensorBoard; empty for a number that is not there
    tag_with_bn: str | None = None  # in networks with BatchNorm or other parameters never pruned; None: as ``tag``
    words: str | None = None  # before the number in the console's line of an epoch; None for a number not in it
    also: str = ""  # where else it is shown, in Markdown
    optional: bool = False

    @property
    def by_layer(self) -> bool:
        return "{layer}" in self.path + self.tag

    @property
    def group(self) -> str:
        """The numbers of a group are recorded for the same layers."""
        return (self.path or self.tag).split("/")[0]

    def keys(self, layer: str | None) -> list[str]:
        """The keys that lead to the number in its file."""
        return [part.format(key=self.key, layer=layer) for part in self.path.split("/")]

    def tag_of(self, layer: str | None, batch_norm: bool) -> str:
        tag = self.tag if self.tag_with_bn is None or not batch_norm else self.tag_with_bn
        return tag.format(layer=layer)

    def text(self, value: float) -> str:
        """The number in the console's line of an epoch."""
        return f"{self.words} {FORMATS.get(self.unit, '{:,.6g}'.format)(value)}".lstrip()


# In the order of the keys in results.jsonl and test.json.
# fmt: off
METRICS: tuple[Metric, ...] = (
    # training
    Metric("batch_loss", "", (STEP,), "Mean squared error between firing rates and one-hot labels, of one batch, "
           "before its update.", "mean over images and classes of (spikes / T − one-hot)²",
           path="", tag="train/loss", also="progress bar"),
    Metric("batch_accuracy", SHARE, (STEP,), "Share of the batch's images classified correctly, before its update.",
           "right / batch size", path="", tag="train/acc", also="progress bar"),
    Metric("epoch", "epochs", (EPOCH, TEST), "Finished epochs.", also="console, report"),
    Metric("position", "updates", (TEST,), "Updates of the next epoch that the tested network has behind it, too."),
    Metric("step", "updates", (EPOCH,), "Updates in all."),
    Metric("train_loss", "", (EPOCH,), "Mean of batch_loss over the batches of the epoch.", "Σ batch_loss / batches"),
    Metric("train_accuracy", SHARE, (EPOCH,), "Share of the epoch's training images classified correctly, each before "
           "the update by its batch.", "Σ batch_accuracy / batches", also="`epochs.csv`"),
    Metric("test_accuracy", SHARE, (EPOCH, GRID), "Share of test images whose most-spiking class (in a tie, the first) "
           "is the label, in eval mode.", "right / images",
           tag="test_acc", words="test accuracy", also="`epochs.csv`, `table.md`, report"),
    Metric("best_accuracy", SHARE, (EPOCH, GRID), "Highest test accuracy of any epoch so far.",
           "max over epochs of test_accuracy", words="best", also="report"),
    # the accuracy of a test
    Metric("accuracy", SHARE, (TEST,), "Accuracy on the test images, as test_accuracy.", "right / images"),
    Metric("accuracy_interval", SHARE, (TEST,), "Wilson's 95 % score interval of the accuracy p of n images (Wilson "
           "1927): its two ends.", "(p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), z = 1.96"),
    Metric("right", "images", (TEST,), "Test images classified correctly."),
    Metric("images", "images", (TEST,), "All test images."),
    Metric("confusion", "images", (TEST,), "How many images of class i were classified as j.",
           "C[i, j] = #{label i, prediction j}"),
    # connections
    Metric("sparsity", SHARE, (EPOCH, TEST), "Share of prunable weights that are pruned.", "1 − connectivity",
           tag="sparsity", tag_with_bn="sparsity/without bn", words="sparsity"),
    Metric("connectivity", SHARE, (EPOCH, TEST, GRID), "Share of prunable weights that are connected.", "#{w ≠ 0} / #w",
           tag="connectivity", words="connectivity", also="`epochs.csv`, `table.md`, report"),
    Metric("sparsity_with_bn", SHARE, (EPOCH,), "Sparsity with the parameters that are never pruned, such as "
           "BatchNorm's, counted as connected.", "#{w = 0} / (#w + #others)", tag_with_bn="sparsity/with bn"),
    Metric("connectivity_with_bn", SHARE, (EPOCH,), "Connectivity with the parameters that are never pruned counted as "
           "connected.", "1 − sparsity_with_bn"),
    Metric("structural_connectivity", SHARE, (TEST, GRID), "Share of prunable weights that are connected and lie on "
           "some path from an input to an output through connected weights. The path's units are neurons of linear "
           "layers and channels of convolutions.",
           "#{w ≠ 0, its input is reached from an input, its output reaches an output} / #w", optional=True),
    Metric("pruned", "weights", (EPOCH,), "Connections of the previous epoch that are gone.",
           "#{w(e−1) ≠ 0, w(e) = 0}", also="`epochs.csv`, report"),
    Metric("regrown", "weights", (EPOCH,), "Connections that the previous epoch did not have.",
           "#{w(e−1) = 0, w(e) ≠ 0}", also="`epochs.csv`, report"),
    Metric("layer_sparsity", SHARE, (TEST,), "Sparsity of the layer.", "1 − connectivity", "layer_sparsity/{layer}"),
    Metric("connected", "weights", (EPOCH, TEST), "Connected weights of the layer.", "#{w ≠ 0}", LAYERS,
           also="report, export"),
    Metric("structural", "weights", (TEST,), "Connected weights of the layer that lie on a path from an input to an "
           "output.", "structural_connectivity · #w", LAYERS, optional=True),
    Metric("weights", "weights", (EPOCH, TEST), "Prunable weights of the layer.", "#w", LAYERS, also="report, export"),
    Metric("sparsity", SHARE, (EPOCH, TEST), "Share of the layer's weights that are pruned.", "1 − connectivity",
           LAYERS, tag="layer sparsity/{layer}"),
    Metric("connectivity", SHARE, (EPOCH, TEST), "Share of the layer's weights that are connected.", "#{w ≠ 0} / #w",
           LAYERS, also="report"),
    Metric("structural_connectivity", SHARE, (TEST,), "Share of the layer's weights that are connected and lie on a "
           "path from an input to an output.", "structural / #w", LAYERS, optional=True),
    Metric("pruned", "weights", (EPOCH,), "Connections that the layer had in the previous epoch and that are gone.",
           "#{w(e−1) ≠ 0, w(e) = 0}", LAYERS, tag="prune_cnt/{layer}", also="report"),
    Metric("regrown", "weights", (EPOCH,), "Connections that the layer did not have in the previous epoch.",
           "#{w(e−1) = 0, w(e) ≠ 0}", LAYERS, tag="regrow_cnt/{layer}", also="report"),
    Metric("net_pruned", "weights", (EPOCH,), "Net loss of the layer's connections in the epoch.", "pruned − regrown",
           path="", tag="prune-regrow/{layer}"),
    # settings and time
    Metric("learning_rate", "", (EPOCH,), "Learning rate of the first optimizer in the epoch's last step.",
           "as set, or scheduled by `--recipe fast`", also="report"),
    Metric("penalty", "", (EPOCH,), "The method's penalty in the epoch's last step: Grad R's alpha, Deep R's l1; null "
           "without one.", "as set, or scheduled by `--connectivity`"),
    Metric("train_seconds", SECONDS, (EPOCH,), "Wall time of the epoch's training, checkpoints excluded."),
    Metric("test_seconds", SECONDS, (EPOCH,), "Wall time of the test and of counting and recording after the epoch."),
    Metric("checkpoint_seconds", SECONDS, (EPOCH,), "Wall time that training waited for checkpoints since the previous "
           "line: for one after the previous epoch, and those within the epoch."),
    Metric("epoch_seconds", SECONDS, (EPOCH,), "Wall time of the epoch.",
           "train_seconds + test_seconds + checkpoint_seconds", path="", words="",
           also="report, as s/epoch: the median over the epochs"),
    # neurons and distributions
    Metric("firing_rate", "spikes", (FULL, TEST), "Spikes per neuron, image and time step of the LIF layer on the test "
           "set.", "spikes / (neurons · images · T)", NEURONS, tag="avg_firing_rate/{layer}", optional=True,
           also="report; of each neuron in `rate-<layer>-….npy` after a test"),
    Metric("silent", SHARE, (FULL, TEST), "Share of the LIF layer's neurons without a spike on the whole test set.",
           "#{spikes = 0} / neurons", NEURONS, tag="nonfire_prop/{layer}", optional=True, also="report"),
    Metric("w", DISTRIBUTION, (FULL,), "Distribution of the layer's weights w: `edges` of the bins, `counts` between "
           "them.", "counts_i = #{edge_i ≤ w < edge_(i+1)}", DISTRIBUTIONS, tag="{layer}-w", optional=True,
           also="report, as density"),
    Metric("theta", DISTRIBUTION, (FULL,), "Distribution of the layer's synaptic parameters θ, where the method has "
           "them.", "as of w", DISTRIBUTIONS, tag="{layer}-theta", optional=True, also="report, as density"),
    # the operations of a test
    Metric("kind", "", (TEST,), "What the layer's operations are: MAC, multiply-accumulates, in the first layer, which "
           "takes real numbers and runs once per image; SynOp, synaptic operations, in all others.", "–",
           "operations/{layer}/kind", optional=True),
    Metric("operations_pruned", "per image", (TEST,), "SynOps: for every spike that arrives at the layer, the "
           "connected weights that it meets; weights of 0 and padding cost nothing. MACs: every input value times the "
           "connected weights that it meets.",
           "SynOps: Σ_i spikes_i · fan-out_i / images; MACs: Σ_i fan-out_i", "operations/{layer}/pruned",
           optional=True),
    Metric("operations_dense", "per image", (TEST,), "The same spikes and input values, with every weight connected.",
           "the same, with all weights in fan-out_i", "operations/{layer}/dense", optional=True,
           also="`-test`: “all connected”"),
    Metric("energy_pruned", "pJ per image", (TEST,), "Energy of this arithmetic, 32-bit float, 45 nm, without memory "
           f"access: {AC:g} pJ per accumulate, {MAC:g} pJ per multiply-accumulate (M. Horowitz, \"Computing's energy "
           "problem (and what we can do about it)\", ISSCC 2014).", ENERGY, "energy/pruned", optional=True),
    Metric("energy_dense", "pJ per image", (TEST,), "The same with every weight connected.", ENERGY, "energy/dense",
           optional=True, also="`-test`: “all connected”"),
    Metric("data", "", (TEST,), "What the test was of: the numbers of training and test images, and a checksum of all "
           "pixels and labels.", also="`export`"),
    Metric("precision", "", (TEST,), "Precision of the test's matrix products and convolutions."),
    # the rows of a grid
    Metric("connected", "weights", (GRID,), "Connected weights of all layers.", "Σ over layers of #{w ≠ 0}",
           also="`table.md`, figures"),
    Metric("weights", "weights", (GRID,), "Prunable weights of all layers.", "Σ over layers of #w", also="`table.md`"),
    Metric("synops", "per image", (GRID,), "SynOps of the pruned network.", "Σ over layers of operations_pruned",
           also="`table.md`"),
    Metric("macs", "per image", (GRID,), "MACs of the pruned network.", "operations_pruned of the first layer",
           also="`table.md`"),
    Metric("energy_pj", "pJ per image", (GRID,), "Energy of the pruned network, as energy_pruned.", ENERGY),
    Metric("pruned_in_all", "weights", (GRID,), "Connections pruned in all epochs.", "Σ over epochs of pruned"),
    Metric("regrown_in_all", "weights", (GRID,), "Connections regrown in all epochs.", "Σ over epochs of regrown",
           also="`table.md`"),
    Metric("train_seconds", SECONDS, (GRID,), "Wall time of the training, checkpoints excluded, while other rows ran "
           "beside it.", "Σ over epochs of train_seconds"),
)
# fmt: on


def page() -> str:
    """docs/metrics.md with its tables anew. Each follows the comment that says when its numbers are recorded."""
    tables = r"(<!-- (\w+) -->\n\n)(?:\|.*\n)*"
    return re.sub(tables, lambda found: found[1] + _table(found[2]), PAGE.read_text(encoding="utf-8"))


def _table(when: str) -> str:
    rows = [("number", "unit", "where", "definition", "formula"), ("---",) * 5]
    for metric in METRICS:
        if metric.when[0] == when:
            name = f"{metric.key}, by layer" if metric.by_layer else metric.key
            rows.append((name, metric.unit or "–", _where(metric), metric.definition, metric.formula))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _where(metric: Metric) -> str:
    """Where a number is written and shown, in Markdown."""
    files = dict.fromkeys(f"`{FILES[when]}`" for when in metric.when if when in FILES and metric.path)
    where = [", ".join(files)] if files else []
    if files and metric.path != "{key}":
        where[0] += f" as `{'/'.join(metric.keys('<layer>'))}`"
    if metric.tag:
        where.append(f"TensorBoard `{metric.tag_of('<layer>', False)}`")
    if metric.tag_with_bn:
        where.append(f"TensorBoard `{metric.tag_with_bn}` with BatchNorm")
    if metric.words is not None:
        where.append(f"console, as “{metric.words}”" if metric.words else "console")
    return "; ".join(filter(None, [*where, metric.also]))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
