"""Safe files: written whole or not at all, and checked before use."""

from training.files.writing import (
    BINARY,
    expanded,
    naming,
    replace,
    replacing,
    sync,
    sync_file,
    sync_folder,
    warn_once,
    write_whole,
)
