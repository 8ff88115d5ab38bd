"""Images: from published files to the batches of a run."""

from training.data.batches import TestBatches, TrainingBatches
from training.data.dataset import Dataset, DataSource, Split
from training.data.transforms import Normalisation, RandomAffine, RandomCropFlip
