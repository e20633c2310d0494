"""python -m netclone: the command line."""

from netclone.cli import app

if __name__ == "__main__":
    app(prog_name="netclone")
