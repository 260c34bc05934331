"""The `acmix` command, outside of the package: that loads PyTorch, which takes seconds, and Ctrl-C
within them shall end in silence instead of a traceback.
"""

import signal


def main() -> int:
    """As `acmix.cli.main`, for the options on the command line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from acmix import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()
