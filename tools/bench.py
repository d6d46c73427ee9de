"""Measure speed and memory, and print the tables of docs/speed.md.

Run it as `python -m tools.bench`.
"""

from collections.abc import Collection
from pathlib import Path

from tools.bench_command import command_table, measure_command, measure_start, start_table
from tools.bench_network import measure_network, network_table
from tools.bench_peers import measure_peers, peer_table
from tools.bench_sets import measure_sets, set_table
from tools.measuring import DTYPES, describe_machine, measure_ceilings, resource
from utils import ArgumentParser, CommandError, path, run_command, show

TABLES = ("network", "sets", "command", "peers")


def main() -> None:
    start = "python -m tools.bench"
    parser = ArgumentParser(prog=start, description=__doc__, examples=f"  {start}\n  {start} --only command peers")
    text = "training images (default: %(default)s)"
    parser.add_argument("--data", type=path, default=Path("data/91-image"), metavar="DIR", help=text)
    text = "test images for the PSNR of peers (default: Set5 beside --data)"
    parser.add_argument("--test-data", type=path, metavar="DIR", help=text)
    text = f"tables to print (default: all): {', '.join(TABLES)}"
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help=text)
    args = parser.parse_args()
    if resource is None:
        raise CommandError("the benchmark runs on Linux and macOS only")
    for folder in filter(None, (args.data, args.test_data)):
        if not folder.is_dir():
            raise CommandError(f"{folder}: no such folder; `python data.py` downloads the training and test images")
    print_tables(args.data, args.test_data or args.data.resolve().parent / "Set5", args.only)


def print_tables(folder: Path, test_data: Path, names: Collection[str]) -> None:
    ceilings = measure_ceilings()
    show(describe_machine(ceilings))
    precisions = list(ceilings)
    if "network" in names:
        show("", *network_table(measure_network(folder, ceilings)))
    if "sets" in names:
        show("", *set_table(folder.resolve().name, measure_sets(folder, DTYPES[precisions[-1]])))
    if "command" in names:
        show("", *command_table(measure_command(folder)))
        show("", *start_table(measure_start()))
    if "peers" in names:
        measurements = measure_peers(test_data if test_data.is_dir() else None, precisions)
        show("", *peer_table(test_data.name, measurements))


if __name__ == "__main__":
    run_command(main)
