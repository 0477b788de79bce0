from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fabric.testing.commands import get_environ, read_blocks, run_blocks

PAGE = """Some words.

```console
$ NAME=one
$ cat > kept <<END
two $NAME
END
```
```yaml
name: nobody runs this
```
```python
print(open("kept").read().strip())
```
"""


def test_blocks_run_in_order_without_their_prompts(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    blocks = read_blocks(tmp_path / "page.md")
    assert [block.language for block in blocks] == ["console", "python"]
    assert run_blocks(blocks, get_environ(tmp_path), tmp_path) == ["", "two one\n"]


@pytest.mark.parametrize(
    "text",
    ["```console\n$ echo said; no-such-command\n```\n", "```python\nprint('said'); 1 / 0\n```\n"],
)
def test_a_block_that_fails_is_told_with_what_it_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=r"(?s)said.*(not found|ZeroDivisionError)"):
        run_blocks(read_blocks(tmp_path / "page.md"), get_environ(tmp_path), tmp_path)


def test_a_block_that_does_not_end_is_ended(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```console\n$ exec sleep 600\n```\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_blocks(read_blocks(tmp_path / "page.md"), get_environ(tmp_path), tmp_path, 0.5)


def test_settings_from_outside_are_not_in_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FABRIC_API_KEY", "of somebody else")
    environ = get_environ(tmp_path, PLACE="here")
    assert "FABRIC_API_KEY" not in environ
    assert (environ["PLACE"], environ["FABRIC_STATE_DIR"]) == ("here", str(tmp_path / "state"))
