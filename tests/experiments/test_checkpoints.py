import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import checkpoints
from experiments.errors import CheckpointError

PARAMS = {
    "conv1": {"bias": jnp.arange(3.0), "weight": jnp.arange(24.0).reshape(2, 2, 2, 3)},
    "dense1": {"weight": jnp.ones((4, 2)) / 3},
}


def test_names_are_paths_in_the_tree(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoints.save(path, PARAMS)
    arrays = load_file(path)
    assert set(arrays) == {"conv1/bias", "conv1/weight", "dense1/weight"}
    np.testing.assert_array_equal(arrays["conv1/weight"], PARAMS["conv1"]["weight"])
    assert list(tmp_path.iterdir()) == [path]


def test_saved_weights_are_loaded_bit_for_bit(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoints.save(path, PARAMS)
    loaded = checkpoints.load(path, like=jax.eval_shape(lambda: PARAMS))
    assert jax.tree.structure(loaded) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS)


def test_a_transposed_view_is_written_in_the_order_of_its_indices(tmp_path):
    path = tmp_path / "weights.safetensors"
    view = {"weight": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
    checkpoints.save(path, view)
    np.testing.assert_array_equal(checkpoints.load(path, view)["weight"], view["weight"])


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ({"weight": jnp.zeros((2, 3))}, r"weight: must be float32 \(2, 3\), got float32 \(3, 2\)"),
        ({"weight": jnp.zeros((3, 2), jnp.int32)}, r"weight: must be int32 \(3, 2\), got float32 \(3, 2\)"),
        ({"weight": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}, r"bias: must be float32 \(2,\), got no such parameter"),
        ({}, r"weight: must be absent, got float32 \(3, 2\)"),
    ],
)
def test_weights_of_another_net(tmp_path, like, expected):
    path = tmp_path / "weights.safetensors"
    checkpoints.save(path, {"weight": jnp.zeros((3, 2))})
    with pytest.raises(CheckpointError, match=expected):
        checkpoints.load(path, like)


def test_invalid_weights_files(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match="must be a safetensors file, got no such file"):
        checkpoints.load(path, PARAMS)
    with pytest.raises(CheckpointError, match="got Is a directory"):
        checkpoints.load(tmp_path, PARAMS)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match="must be an intact safetensors file"):
        checkpoints.load(path, PARAMS)
    checkpoints.save(path, PARAMS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="must be an intact safetensors file") as caught:
        checkpoints.load(path, PARAMS)
    assert "\n" not in str(caught.value)
