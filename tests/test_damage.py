"""Every container of masks cut short at any byte, and with any bit flipped: refused, and named."""

import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.stores import codecs
from tests.conftest import filled_store, random_masks, relu_net

FILES = ("mask store", "hopfield store", "exported task", "bitpack", "enumerative", "xor-delta")
FOLDER = ("manifest.json", "tasks.bin", "index.bin", "reservoir.bin")


@pytest.fixture(scope="module")
def net():
    return relu_net((6, 6, 5))


@pytest.fixture(scope="module")
def masks(net):
    return random_masks(net, 3)


def reservoir(net, masks):
    store = ss.hopfield.HopfieldStore.create(net)
    for mask in masks:
        store = store.append(mask)
    return store


@pytest.fixture(scope="module")
def folder(net, masks, tmp_path_factory):
    """A task in each way to code one, and Hopfield networks beside them."""
    path = tmp_path_factory.mktemp("damage") / "store"
    with ss.DiskStore.open(path, net, mode="x") as disk:
        disk.append(masks[0], name="zero", labels=["a"])
        disk.append(masks[1], codec="enumerative")
        disk.append(masks[2], codec="xor-delta", base=0)
        disk.export(1, path.parent / "exported task")
    reservoir(net, masks).save(path / "reservoir.bin")
    return path


@pytest.fixture(scope="module")
def whole(net, masks, folder):
    """{container: (its bytes, what reads it)} of FILES."""
    path = folder.parent
    filled_store(net, masks, capacity=4).save(path / "mask store")
    reservoir(net, masks).save(path / "hopfield store")
    codecs_of = {name: masks[0] if name == "xor-delta" else None for name in codecs.CODECS}
    for name, base in codecs_of.items():
        (path / name).write_bytes(codecs.encode(masks[1], name, base))

    other = ss.DiskStore.open(path / "other", net, mode="x")
    readers = {
        "mask store": lambda file: ss.MaskStore.load(file, net),
        "hopfield store": lambda file: ss.hopfield.HopfieldStore.load(file, net),
        "exported task": other.append_file,
    } | {
        name: lambda file, base=base: codecs.decode(file.read_bytes(), net.layout, base)
        for name, base in codecs_of.items()
    }
    yield {name: ((path / name).read_bytes(), readers[name]) for name in FILES}
    other.close()


def damages(data, most):
    """About so many cuts and so many flips: every cut and every bit of what is short enough."""
    size = len(data)
    for end in {*range(0, size, 1 + size // most), *range(size - 9, size)}:
        yield data[:end]
    for bit in range(0, 8 * size, 1 if 8 * size < 8 * most else 1 + 8 * size // most):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


@pytest.mark.parametrize("name", FILES)
def test_no_damaged_file_is_read(whole, tmp_path, name):
    data, read = whole[name]
    file = tmp_path / "damaged"
    file.write_bytes(data)
    read(file)  # as it was written
    says = "damaged" if name not in codecs.CODECS else "not a coded mask|checksum"
    for damaged in (*damages(data, 300), data + b"\0"):
        file.write_bytes(damaged)
        with pytest.raises(ss.StoreError, match=says):
            read(file)


@pytest.mark.parametrize("name", FOLDER)
def test_no_damage_to_a_folder_goes_unnoticed(net, masks, folder, name):
    """Each mask comes back as it was or not at all, and the file is named."""
    with ss.DiskStore.open(folder, net) as disk:
        want = [disk.words(i) for i in range(3)]
        assert disk.verify() == []
    bits = want[2][None] >> np.arange(32, dtype=np.uint32)[:, None] & 1
    np.testing.assert_array_equal(bits.reshape(-1), net.layout.ravel(masks[2], "it"))
    data = (folder / name).read_bytes()
    try:
        for damaged in damages(data, 60):
            (folder / name).write_bytes(damaged)
            said = look(folder, net, want)
            assert name in said, said
    finally:
        (folder / name).write_bytes(data)


def look(folder, net, want):
    """What opening, reading and verifying say, once no mask is seen to come back wrong."""
    said = []
    try:
        disk = ss.DiskStore.open(folder, net)
    except ss.StoreError as error:
        return str(error)
    with disk:
        for i in range(len(disk)):
            try:
                np.testing.assert_array_equal(disk.words(i), want[i])
            except ss.StoreError as error:
                said.append(str(error))
        return "\n".join([*said, *map(str, disk.verify())])
