"""`python -m itm_nb run train ...`: the commands, where none are on the path."""
import sys

from itm_nb.cli import main

if __name__ == '__main__':
    sys.exit(main())
