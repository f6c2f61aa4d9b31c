"""The command line, ``normwear-fast``: one module a command, imported when it is chosen."""
