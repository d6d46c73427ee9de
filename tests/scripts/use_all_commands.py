"""Train, resume, inspect and upscale in the current folder, on the images in the folder given."""

import runpy
import sys


def call(*argv):
    sys.argv = list(argv)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{argv} ended with status {end.code}") from end


photos = sys.argv[1]
options = [f"--train-data={photos}", f"--test-data={photos}", "--batch-size=4", "--patch-size=48", "--num-epoch=1"]
call("train.py", "train", *options)
call("train.py", "resume", "checkpoint.last", "--num-epoch=2")
call("train.py", "inspect", "checkpoint.2")
call("super_resolve.py", "--checkpoint", "checkpoint.pth", "lr.png")
