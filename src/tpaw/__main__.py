"""`python -m tpaw` is the command line."""

from tpaw.cli.main import main

if __name__ == "__main__":
    main()
