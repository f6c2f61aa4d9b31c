"""``python -m normwear_fast.cli``: the command line where its script is not on the path."""

from normwear_fast.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
