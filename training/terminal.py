"""What command lines print, on terminals and pipes of every kind."""

import sys


def print_anything() -> None:
    """Characters that the encoding of standard output or standard error lacks are written as escapes from now on."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a stream that a test put there
            stream.reconfigure(errors="backslashreplace")
