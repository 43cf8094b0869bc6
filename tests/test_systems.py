"""Stores on systems that lack calls of Linux's, and memory as containers have it."""

import errno
import os
import subprocess
import sys
import types

import pytest

import supsup_jax as ss
from supsup_jax import devices
from supsup_jax.stores import system
from tests.conftest import ROOT, filled_store, random_masks

# Windows as far as it can be had here: what is not there is taken away, what it refuses is refused.
AS_ON_WINDOWS = """
import builtins, errno, os, pathlib, sys
import flax.nnx, jax, numpy as np, optax

for name in ("sysconf", "pread", "pwrite", "fdatasync", "O_DIRECTORY", "fork", "getuid"):
    delattr(os, name)
sys.modules["fcntl"] = None
opened, unlink, replace = os.open, os.unlink, os.replace

def check_not_open(path):
    for link in pathlib.Path("/proc/self/fd").iterdir():
        if os.path.exists(link) and os.path.exists(path) and os.path.samefile(link, path):
            raise PermissionError(errno.EACCES, "used by a process", str(path))

def no_folder(path, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "a folder", str(path))
    return opened(path, *rest, **options)

def closed_unlink(path, **options):
    if not str(path).endswith("writer.lock"):  # O_TEMPORARY sees to that one
        check_not_open(path)
    unlink(path, **options)

def closed_replace(source, target):
    check_not_open(source)
    check_not_open(target)
    replace(source, target)

os.open, os.unlink, os.replace = no_folder, closed_unlink, closed_replace

import supsup_jax as ss
from tests.conftest import random_masks, relu_net

out = pathlib.Path(sys.argv[1])
net = relu_net((6, 6, 5))
masks = random_masks(net, 3)
store = ss.MaskStore.create(net, 2)
for mask in masks:
    store = store.append(mask)
for _ in range(2):
    store.save(out / "store", overwrite=True)

def same(store, ids):
    for i, mask in enumerate(ids):
        jax.tree.map(np.testing.assert_array_equal, store.mask(i), masks[mask])

same(ss.MaskStore.load(out / "store", net), range(3))

def refused(function):
    try:
        function()
    except OSError as error:
        print(error)
    except ss.StoreError as error:
        print(error)
    else:
        raise AssertionError("not refused")

path = out / "tasks"
with ss.DiskStore.open(path, net, mode="a") as disk:
    for mask in masks:
        disk.append(mask)
    refused(lambda: ss.DiskStore.open(path, net, mode="a"))
    with ss.DiskStore.open(path, net) as reader:
        same(reader.load(), range(3))
        disk.remove(1)
        reader.refresh()
        same(reader.load(), (0, 2))
        refused(disk.compact)
with ss.DiskStore.open(path, net, mode="a") as disk:
    assert disk.compact() > 0
    disk.append(masks[1])
    assert disk.verify() == []
    same(disk.load(), (0, 2, 1))
assert sorted(os.listdir(path)) == ["index.bin", "manifest.json", "tasks.bin"]
(path / "writer.lock").touch()  # of a process that died
refused(lambda: ss.DiskStore.open(path, net, mode="a"))
(path / "writer.lock").unlink()
ss.DiskStore.open(path, net, mode="a").close()
"""


def test_a_store_is_made_saved_and_loaded_as_on_windows(tmp_path):
    command = [sys.executable, "-c", AS_ON_WINDOWS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, (second, compaction, stale) = tmp_path / "tasks", done.stdout.splitlines()
    assert second == stale
    assert second == (
        f"another writer has {path} open, and there can be one: wait for it, with timeout=SECONDS "
        f"if you like, or open with mode='r'; if it died, delete {path / 'writer.lock'}"
    )
    assert "a reader has the store open" in compaction and "compact again" in compaction


def test_macos_is_asked_to_empty_the_drive_s_cache(tmp_path, small_net, monkeypatch):
    asked, refused = [], []

    def asking(fd, what):
        asked.append(what)
        if refused:
            raise OSError(refused[0], os.strerror(refused[0]))

    mac = types.SimpleNamespace(F_FULLFSYNC=51, fcntl=asking)
    monkeypatch.setattr(system, "fcntl", mac)
    store = filled_store(small_net, random_masks(small_net, 2))
    store.save(tmp_path / "store")
    assert asked == [51, 51]  # the file, and its name
    refused.append(errno.ENOTSUP)  # a drive of the network: fsync is what there is
    store.save(tmp_path / "store", overwrite=True)
    refused[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        store.save(tmp_path / "store", overwrite=True)


def test_files_have_the_rights_that_the_umask_leaves_and_it_stays(tmp_path, small_net):
    former = os.umask(0o027)
    try:
        filled_store(small_net, random_masks(small_net, 1)).save(tmp_path / "store")
        ss.DiskStore.open(tmp_path / "tasks", small_net, mode="x").close()
    finally:
        assert os.umask(former) == 0o027
    for name in ("store", "tasks/tasks.bin", "tasks/index.bin", "tasks/manifest.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000\n"}, 5000),
        ("0::/a/b\n", {"a/b/memory.max": "3000\n", "a/memory.max": "5000\n"}, 3000),
        ("0::/not/seen/inside\n", {"memory.max": "4000\n"}, 4000),
        ("2:cpu:/x\n1:hugetlb,memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "7"}, 7),
        ("0::/\n", {}, None),
        (None, {}, None),
    ],
)
def test_memory_is_what_the_container_has(tmp_path, monkeypatch, groups, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(devices, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "GROUPS_MOUNT", tmp_path)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert devices.device_bytes() == (limit or 40960)
