"""Commands as somebody types them: with an environment of their own, and as pages show them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fabric.testing.hub import RunningHub

_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What a page gives to be typed: ``language`` is ``console`` or ``python``."""

    language: str
    text: str

    @property
    def script(self) -> str:
        """The text without its prompts."""
        return re.sub(r"^\$ ", "", self.text, flags=re.M)

    def run(
        self, environ: Mapping[str, str], folder: Path, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run it in a folder to its end, which must be a success.

        Raises:
            AssertionError: It failed; the message has all that it said.
            subprocess.TimeoutExpired: It runs after ``timeout_s`` seconds.
        """
        shell = ("bash", "-euo", "pipefail")
        argv = (*(shell if self.language == "console" else (sys.executable,)), "-c", self.script)
        done = subprocess.run(
            argv,
            env=environ,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{self.text}\n{done.stdout}\n{done.stderr}"
        return done


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that can be run, in their order."""
    found = _BLOCK.findall(page.read_text())
    return [Block(language=language, text=text) for language, text in found]


def run_blocks(
    blocks: Iterable[Block], environ: Mapping[str, str], folder: Path, timeout_s: float = 120.0
) -> list[str]:
    """Run blocks in their order; return what each wrote to its output. See ``Block.run``."""
    return [block.run(environ, folder, timeout_s).stdout for block in blocks]


def get_environ(folder: Path, hub: RunningHub | None = None, **more: str) -> dict[str, str]:
    """Return the environment of somebody's commands, without settings of ours or of a Slurm.

    Args:
        folder: Where their state and configuration are.
        hub: What they and an OpenAI client of theirs ask, with the key of its project.
        more: Further variables; they replace others of their name.
    """
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FABRIC_", "SLURM"))
    }
    environ |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FABRIC_STATE_DIR": str(folder / "state"),
        "XDG_CONFIG_HOME": str(folder / "config"),
    }
    if hub is not None:
        environ |= {
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": hub.api_key,
            "OPENAI_BASE_URL": hub.openai_url,
            "OPENAI_API_KEY": hub.api_key,
        }
    return environ | more
