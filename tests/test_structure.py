"""Structure of the project: six files at the top, folders by subject, and imports that run down docs/files.md."""

import ast
import itertools
import re

import pytest
from helpers import ROOT

TABLE = re.findall(
    r"^\| `([\w/]+)\.py` \|", (ROOT / "docs" / "files.md").read_text("utf-8"), re.M
)  # from top to bottom


def imported_names(path):
    """Return the names that a file imports, such as "torch.nn" and "imaging.images.bicubic"."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return names | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


@pytest.mark.parametrize("file", [file for file in TABLE if file != "utils"])
def test_only_utils_writes_to_the_terminal(file):
    """Its functions escape control characters in foreign text."""
    nodes = ast.walk(ast.parse((ROOT / f"{file}.py").read_text("utf-8")))
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert not {"print", "tqdm", "tqdm.write", "sys.stdout.write", "sys.stderr.write"} & calls


def test_docs_list_every_file_once():
    folders = (".", "imaging", "tools", "training", "upscaling")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    assert sorted(TABLE) == sorted(file.relative_to(ROOT).with_suffix("").as_posix() for file in files)


@pytest.mark.parametrize("file", TABLE)
def test_file_imports_only_files_below_it_in_table(file):
    imported = [f"{name}." for name in imported_names(ROOT / f"{file}.py")]
    above = [other.replace("/", ".") for other in TABLE[: TABLE.index(file)]]
    assert not [other for other in above if any(name.startswith(f"{other}.") for name in imported)]


def test_each_folder_is_one_block_of_table():
    folders = [file.rpartition("/")[0] for file in TABLE if "/" in file]
    assert [folder for folder, _ in itertools.groupby(folders)] == ["tools", "training", "upscaling", "imaging"]


def test_top_folder_has_six_files_of_assignment():
    six = {"train", "model", "data", "utils", "super_resolve", "info"}
    assert {path.stem for path in ROOT.glob("*.py")} == six


def test_model_imports_only_torch():
    assert {name.split(".")[0] for name in imported_names(ROOT / "model.py")} == {"torch"}
