"""What the tests share: the reference, tiny checkpoints, engines, servers and commands.

`engine_process.py` and `forked_command.py` are programs. They are started by their path, so this
folder is the first place where they look for modules: no file here may have the name of a module
of the standard library.
"""

from pathlib import Path

import pytest

# Failed assertions here show their values, as those of test modules do.
pytest.register_assert_rewrite(
    *(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py"))
)
