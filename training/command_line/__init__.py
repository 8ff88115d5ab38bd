"""What all command lines share: a failure is one line; a mistyped option or value gets a suggestion."""

from training.command_line.command import command
from training.command_line.parser import Parser, either, nearest
from training.command_line.types import (
    check_output,
    check_writable,
    file_path,
    folder_path,
    format_number,
    number,
    output_file,
    whole_number,
    writing,
)
