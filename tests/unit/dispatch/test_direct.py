import pytest

from fabric.dispatch.direct import open_direct
from fabric.errors import SessionLost, SessionRefused
from fabric.testing.rig import get_spec, start_instance


async def test_wrong_token_is_refused(tmp_path) -> None:
    with start_instance(get_spec(tmp_path)) as instance:
        for token in ("", "wrong", "ü"):
            with pytest.raises(SessionRefused, match="401"):
                await open_direct(instance.direct_url, token)


async def test_nobody_listening_is_a_lost_session(free_port) -> None:
    with pytest.raises(SessionLost, match="cannot be reached"):
        await open_direct(f"ws://127.0.0.1:{free_port}/", "token")
