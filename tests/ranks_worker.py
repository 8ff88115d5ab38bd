"""An experiment's script for the tests of several ranks: python ranks_worker.py c10 ..., with changes from RANKS_TEST.

RANKS_TEST is a JSON object: "scale" multiplies the initial weights of the last layers, so that the network's outputs
spike; "signal": [number, rank, step] sends a rank a signal within a step of its process, counted from 1; "drift":
[rank, step] changes a weight of one rank after a step; "busy" makes each step as many seconds longer.

An orderly end of a rank always aborts. By itself it does so now and then.
"""

import atexit
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from analysis.experiments import EXPERIMENTS
from training import loop, script
from training.command_line import command
from training.step import TrainingStep

CHANGES = json.loads(os.environ.get("RANKS_TEST", "{}"))
RANK = int(os.environ.get("RANK", "0"))

if "RANK" in os.environ:
    atexit.register(os.abort)


def scaled(make):
    def network(*arguments, **settings):
        made = make(*arguments, **settings)
        with torch.no_grad():
            for weight in made.fc.parameters():
                weight *= CHANGES.get("scale", 1)
        return made

    return network


class Step(TrainingStep):
    taken = 0

    def _eager(self, *batch):
        self.taken += 1
        number, rank, step = CHANGES.get("signal", (0, None, 0))
        if (rank, step) == (RANK, self.taken):
            os.kill(os.getpid(), number)
        time.sleep(CHANGES.get("busy", 0))
        result = super()._eager(*batch)
        if CHANGES.get("drift") == [RANK, self.taken]:
            with torch.no_grad():
                self.parameters[0].flatten()[0] += 1e-6
        return result


@command
def main(argv=None):
    loop.TrainingStep = Step
    name, *rest = sys.argv[1:] if argv is None else argv
    experiment = EXPERIMENTS[name]
    return script.run(replace(experiment, network=scaled(experiment.network)), rest)


if __name__ == "__main__":
    sys.exit(main())
