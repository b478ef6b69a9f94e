"""Files of a folder."""

import os

import pytest

from muser_dist.data.corpora.folder import read_folder
from muser_dist.data.rows import index_files
from muser_dist.errors import DataError
from muser_dist.files import files_in


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    for name in ("a/x.mp3", "b/c/y.mp3"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.mp3").symlink_to(tmp_path / "absent")
    assert sorted(files_in(tmp_path)) == [str(tmp_path / "a/x.mp3"), str(tmp_path / "b/c/y.mp3")]
    scandir = os.scandir

    def refusing(path):  # as the system does for all but root
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for read in (files_in, index_files, read_folder):
        with pytest.raises(DataError, match="b/c cannot be listed: Permission denied"):
            list(read(tmp_path))
