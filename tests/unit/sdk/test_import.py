"""What importing the client costs."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_client_imports_nothing_heavy() -> None:
    heavy = "torch transformers parsl sqlalchemy fastapi numpy httpx click globus_sdk"
    code = (
        "import sys, fabric.sdk, fabric.sdk.parsl;"
        f"print([name for name in {heavy.split()!r} if name in sys.modules]);"
        "print(sorted({m.split('.')[1] for m in sys.modules if m.startswith('fabric.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['errors', 'sdk']"]
