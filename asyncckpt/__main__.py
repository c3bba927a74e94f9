"""`python -m asyncckpt`: the command line."""

from asyncckpt.cli.app import main

if __name__ == "__main__":
    main()
