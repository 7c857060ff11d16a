"""`python .../syncbn/cluster ...` is `syncbn launch ...`, without the seconds that importing torch takes.

Python that is given a folder knows no package. Here is one that has the files of syncbn, but has not run its __init__.
"""

import os
import signal
import sys
import types
from pathlib import Path

if "SLURM_STEP_ID" in os.environ:  # ended for another task's sake, until there is more to end: with the lowest status
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))

if not __package__:
    package = types.ModuleType("syncbn")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["syncbn"] = package
    del sys.path[0]  # this folder

from syncbn.cluster._main import main

main(sys.argv[1:])
