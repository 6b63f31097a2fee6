"""The training benchmark times whole runs, and its PyTorch model equals `MisterE`."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.training import measure_training
from mister_jax import MisterE, losses
from mister_jax.errors import InputError
from mister_jax.losses import LossWeights
from mister_jax.optim import OptimizerConfig, average_parameters
from mister_jax.tasks.fusion import apply_to_batch
from tests.helpers.training import write_tiny_dataset

CHANGES = {
    "data.batch_size": 4,
    "data.num_buckets": 1,
    "model.context_dim": 8,
    "model.fusion_dim": 8,
    "model.attention_dim": 6,
    "train.epochs": 2,
}
LENGTHS = [4, 1, 3]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tiny_dataset(folder, {"train": 10, "validation": 3, "test": 3})
    return str(folder)


def check_row(row):
    assert (row["dataset"], row["epochs"], row["steps"]) == ("tiny", 2, 6)
    assert 0 < row["first_step_s"] < row["trained_s"] < row["scored_s"]
    assert row["steps_per_second"] > 6 / row["trained_s"]
    assert row["cpu_s"] > 0
    assert 100 < row["peak_memory_mib"] < 10_000
    assert 0 <= row["test_weighted_f1"] <= 1


def test_commands_are_timed(tiny_dir):
    lines = []
    (row,) = measure_training("tiny", tiny_dir, changes=CHANGES, log=lines.append)
    assert lines == ["training on tiny with mister_jax"]
    assert row["library"] == "mister_jax"
    check_row(row)


def test_variants_are_refused():
    with pytest.raises(InputError, match="--training=tiny,paper; allowed: the name of a dataset"):
        measure_training("tiny,paper")


def test_failure_of_a_command_is_reported(tiny_dir):
    with pytest.raises(InputError, match=r"a training run failed: error: .*learning_rate"):
        measure_training("tiny", tiny_dir, changes={"optimizer.learning_rate": -1.0})


@pytest.mark.parity
def test_pytorch_is_compared(tiny_dir):
    pytest.importorskip("torch")
    rows = measure_training("tiny", tiny_dir, compare=True, changes=CHANGES)
    assert [row["library"] for row in rows] == ["mister_jax", "torch", "torch, 1 thread"]
    for row in rows:
        check_row(row)


@pytest.fixture(scope="module")
def torch_training():
    pytest.importorskip("torch")
    from benchmarks import torch_training

    return torch_training


def torch_weights(model):
    """Returns the parameters of a `MisterE` under the names of the PyTorch model."""
    weights = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value, *parents = np.asarray(variable[...]), *map(str, path[:-1])
        kind = str(path[-1])
        if parents[-1] in ("kernels", "biases"):
            name = ".".join([*parents[:-2], "convolutions", kind])
            is_kernel = parents[-1] == "kernels"
            weights[f"{name}.{'weight' if is_kernel else 'bias'}"] = (
                value.transpose(2, 0, 1) if is_kernel else value
            )
        elif "gru" in parents:
            side, form = kind.split("_")
            name = {"kernel": "weight", "bias": "bias"}[form]
            name = f"{name}_{'ih' if side == 'input' else 'hh'}_l{parents[-1]}"
            directions = value.swapaxes(0, 1) if kind == "input_kernel" else value
            for end, of_direction in zip(("", "_reverse"), directions, strict=True):
                weights[".".join([*parents[:-2], name + end])] = of_direction.T
        elif "stack" in parents:
            before, after = parents[: parents.index("stack")], parents[parents.index("stack") + 1 :]
            after = [part for part in after if part != "attention"]
            for block, of_block in enumerate(value):
                name = ".".join([*before, str(block), *after])
                weights |= linear_weights(name, kind, of_block)
        else:
            name = ".".join(parents).replace("mlp_in", "0").replace("mlp_out", "2")
            weights |= linear_weights(name, kind, value)
    return weights


def linear_weights(name, kind, value):
    """Returns a parameter under its PyTorch name; `key_value` is split into key and value."""
    if kind == "value_bias":
        return {f"{name}.value.bias".lstrip("."): value}
    if name.endswith("key_value"):
        name = name.removesuffix("key_value")
        key, values = np.split(value.T, 2)
        return {f"{name}key.weight": key, f"{name}value.weight": values}
    return {f"{name}.{'bias' if kind == 'bias' else 'weight'}": value.T}


def make_pair(torch_training, config):
    """Returns a `MisterE` with random biases and scales, and the PyTorch model with its weights."""
    import torch

    model = MisterE(config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = random.normal(scale=0.1, size=variable.shape)
        variable[...] = variable[...] + jnp.asarray(noise, jnp.float32)
    reference = torch_training.TorchMisterE(config)
    weights = {name: torch.tensor(value) for name, value in torch_weights(model).items()}
    reference.load_state_dict(weights)
    return model, reference.eval()


def run_torch(reference, batch):
    import torch

    names = ("speech", "text", "speech_present", "text_present")
    inputs = [torch.from_numpy(np.array(batch[name])) for name in names]
    return reference(*inputs, torch.tensor(LENGTHS))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "gamma", "weights"),
    [
        ({}, 1.5, LossWeights(mixture=0.7, speech=0.9, contrastive=0.2, agreement=0.02)),
        ({"gru_layers": 2, "fusion_layers": 2}, 0.0, LossWeights(contrastive=0, agreement=0)),
    ],
)
def test_outputs_and_loss_equal_pytorch(
    torch_training, tiny_config, make_batch, changes, gamma, weights
):
    import torch

    config = dataclasses.replace(tiny_config, **changes)
    model, reference = make_pair(torch_training, config)
    batch = make_batch(LENGTHS)
    # One utterance has neither speech nor text.
    batch["speech_present"][0, 1] = batch["text_present"][0, 1] = False
    output = apply_to_batch(model, batch)
    with torch.no_grad():
        torch_output = run_torch(reference, batch)
    mask = batch["mask"]
    for field in dataclasses.fields(torch_output):
        actual, expected = (np.asarray(getattr(of, field.name)) for of in (torch_output, output))
        np.testing.assert_allclose(
            actual[mask], expected[mask], rtol=1e-5, atol=1e-5, err_msg=field.name
        )
    loss = {"gamma": gamma, "temperature": 0.8}
    expected, _ = losses.mister_e(output, batch["label"], mask, weights, **loss)
    loss = types.SimpleNamespace(**loss, weights=dataclasses.asdict(weights))
    label = torch.from_numpy(np.array(batch["label"])).long()
    actual = torch_training.compute_loss(torch_output, label, loss)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parity
def test_gradients_are_finite_without_any_present_modality(torch_training, tiny_config, make_batch):
    import torch

    _, reference = make_pair(torch_training, tiny_config)
    batch = make_batch(LENGTHS)
    batch["speech_present"][1] = batch["text_present"][1] = False
    loss = types.SimpleNamespace(
        gamma=1.0, temperature=1.0, weights=dataclasses.asdict(LossWeights())
    )
    label = torch.from_numpy(np.array(batch["label"])).long()
    torch_training.compute_loss(run_torch(reference.train(), batch), label, loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in reference.parameters())


@pytest.mark.parity
def test_schedule_equals_pytorch(torch_training):
    import torch

    options = {"name": "adamw", "schedule": "cosine", "warmup_fraction": 0.2, "weight_decay": 0.01}
    config = OptimizerConfig(learning_rate=1e-3, **options)
    optimizer, schedule = torch_training.make_optimizer(torch.nn.Linear(2, 2), config, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [float(config.make_schedule(20)(step)) for step in range(20)]
    np.testing.assert_allclose(rates, expected, atol=1e-9)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


@pytest.mark.parity
def test_collated_dialogues_are_those_of_the_split(torch_training):
    import torch

    lengths = np.array([2, 1, 3])
    values = np.arange(6)
    arrays = {"train/lengths": lengths, "train/label": values}
    for name in ("speech", "text"):
        arrays |= {
            f"train/{name}": np.float32(values)[:, None] + [[0, 1]],
            f"train/{name}_present": values > 0,
        }
    batch = torch_training.collate(torch_training.load_dialogues(arrays, "train")[::2])
    assert batch["lengths"].tolist() == [2, 3]
    assert batch["label"].tolist() == [[0, 1, -1], [3, 4, 5]]
    assert batch["speech_present"].tolist() == [[False, True, False], [True] * 3]
    torch.testing.assert_close(batch["text"][1, 2], torch.tensor([5.0, 6.0]), check_dtype=False)


@pytest.mark.parity
def test_average_of_the_parameters_equals_that_of_the_optimizer(torch_training):
    import torch

    model, averaged = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    averaged.load_state_dict(model.state_dict())
    transformation = average_parameters(0.5)
    params = {name: jnp.asarray(value.detach()) for name, value in model.named_parameters()}
    state = transformation.init(params)
    for num_updates in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += num_updates
        torch_training.update_average(averaged, model, 0.5, num_updates)
        updates = {name: jnp.full_like(value, num_updates) for name, value in params.items()}
        updates, state = transformation.update(updates, state, params)
        params = {name: value + updates[name] for name, value in params.items()}
    for name, average in averaged.named_parameters():
        np.testing.assert_allclose(average.detach(), state.average[name], rtol=1e-5)
