import sys

from utils import run_command


def main():
    for file in (sys.stderr, sys.stdout):
        print("é \udcff", file=file)


if __name__ == "__main__":
    run_command(main)
