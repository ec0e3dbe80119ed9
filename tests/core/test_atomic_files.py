"""Files that are written whole or not at all."""

from __future__ import annotations

from hallo_numguard.core.atomic_files import write_whole


def test_files_have_the_permissions_that_new_files_have(tmp_path):
    write_whole(tmp_path / "ours", b"data")
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["any", "ours"]
