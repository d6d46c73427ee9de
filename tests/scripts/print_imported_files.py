"""Print the files of all modules that train.py and super_resolve.py import."""

import sys

import super_resolve  # noqa: F401
import train  # noqa: F401

files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
print(*files - {None, __file__}, sep="\n")
