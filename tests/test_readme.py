import re

import chex
import jax
import jax.numpy as jnp
import numpy as np

import supsup_jax as ss
from supsup_jax import data, models
from tests.conftest import ROOT


def test_the_ten_lines_run_as_they_stand(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    code, none_of_these, conv_nets, on_disk = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    stream = data.PermutedStream(data.load_dataset("digits"), 2)
    x, y = stream.test[1].batch(jnp.arange(100))
    names = {"tasks": stream.train[:2], "x": x}
    exec(code, names)
    assert (tmp_path / "masks.supsup").exists()
    # 1 and .96 on one machine; another's last bits train other masks, but none near chance.
    assert np.mean(names["belief"].task == 1) > 0.75
    assert np.mean(names["logits"].argmax(-1) == y) > 0.5
    exec(on_disk, dict(names))
    with ss.DiskStore.open("tasks", names["net"]) as disk:
        assert [disk.info(i).name for i in range(2)] == ["customer 0", "customer 1"]
    unknown = data.PermutedStream(data.load_dataset("digits"), 3).test[2]
    names |= {"x_known": x, "x": unknown.batch(jnp.arange(50))[0]}
    exec(none_of_these, names)
    assert np.mean(names["belief"].task == -1) > 0.5
    # As it stands, but for the size of the net and the time it takes.
    monkeypatch.setattr(models, "gem_resnet18", smaller)
    drawn = data.synthetic(jax.random.key(0), (32, 32, 3), 5, 128, 5).train
    assert "steps=5000" in conv_nets
    names["task_data"] = drawn
    exec(conv_nets.replace("steps=5000", "steps=2"), names)
    chex.assert_trees_all_equal(names["mask"], names["task"].mask)


def test_your_own_networks_run_as_they_stand():
    text, names = (ROOT / "docs" / "networks.md").read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    assert names["belief"].scores.shape == (256, 64)
    assert names["store"].num_labels[:2].tolist() == [4, 3]


def smaller(num_outputs, *, rngs):
    return models.ResNet(
        models.BasicBlock, (1,), num_outputs, width=2, small_images=True, rngs=rngs
    )


def test_every_file_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((docs/[^)]+)\)", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"^\| `(supsup_jax/\w+)`", text, re.MULTILINE):
        assert (ROOT / path).is_dir() or (ROOT / f"{path}.py").is_file(), path
