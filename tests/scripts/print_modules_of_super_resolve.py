"""Print the names of the modules that super_resolve.py imports, except for what torch imports."""

import sys

for name in list(sys.modules):  # the server of tests/processes.py has imported libraries
    if name.partition(".")[0] == "tensorboard":
        del sys.modules[name]

import super_resolve  # noqa: E402, F401

print(*sys.modules)
