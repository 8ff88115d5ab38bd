"""Images, from the files that publish them to the batches of a run."""

from training.data.batches import TestBatches as TestBatches
from training.data.batches import TrainingBatches as TrainingBatches
from training.data.dataset import Dataset as Dataset
from training.data.dataset import DataSource as DataSource
from training.data.dataset import Split as Split
from training.data.transforms import Normalisation as Normalisation
from training.data.transforms import RandomAffine as RandomAffine
from training.data.transforms import RandomCropFlip as RandomCropFlip
