"""What all command lines share: a failure is one line, and a mistyped option or value names the nearest right one."""

from training.command_line.command import command as command
from training.command_line.parser import Parser as Parser
from training.command_line.parser import either as either
from training.command_line.parser import nearest as nearest
from training.command_line.types import check_output as check_output
from training.command_line.types import check_writable as check_writable
from training.command_line.types import file_path as file_path
from training.command_line.types import folder_path as folder_path
from training.command_line.types import format_number as format_number
from training.command_line.types import number as number
from training.command_line.types import output_file as output_file
from training.command_line.types import whole_number as whole_number
