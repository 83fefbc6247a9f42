"""`python -m litespark` is the `litespark` command, for launchers such as torchrun."""

from litespark.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
