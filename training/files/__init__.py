"""Safe files: written whole or not at all, and checked before use."""

from training.files.writing import BINARY as BINARY
from training.files.writing import check_replacing as check_replacing
from training.files.writing import expanded as expanded
from training.files.writing import naming as naming
from training.files.writing import replace as replace
from training.files.writing import replacing as replacing
from training.files.writing import sync as sync
from training.files.writing import sync_file as sync_file
from training.files.writing import sync_folder as sync_folder
from training.files.writing import warn_once as warn_once
from training.files.writing import write_whole as write_whole
