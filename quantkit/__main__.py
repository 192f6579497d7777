"""`python -m quantkit`: the command line."""

from quantkit.cli import main

if __name__ == "__main__":
    main(prog_name="quantkit")
