"""`python -m captioning`: the user's commands."""

from captioning.cli import main

if __name__ == "__main__":
    main()
