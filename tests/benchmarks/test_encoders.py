"""The programs of the large encoders run with random parameters, and compile for TPUs."""

import importlib.util
import re

import jax
import pytest

from benchmarks import aot, encoders
from benchmarks.flops import program_flops
from mister_jax.encoders.decoder import DecoderConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs"
)
NUM_LAYERS, HIDDEN_SIZE, MLP_DIM = 2, 16, 48


def tiny_tuning(length, **options):
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=HIDDEN_SIZE,
        mlp_dim=MLP_DIM,
        num_layers=NUM_LAYERS,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        lora=LoRAConfig(rank=2, alpha=4),
        **options,
    )
    return encoders.text_tuning(config, length)


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, "tiny", tiny_tuning)


@pytest.mark.parametrize("encoder", ["llama_3_1_8b", "qwen2_5_7b"])
def test_flops_are_two_per_parameter_and_token_forward_and_four_in_tuning(encoder):
    length = 128
    flops = encoders.model_flops(encoder, length)
    tuning = encoders.make_tuning(encoder, length)
    _, state = aot.abstract_state(lambda: encoders.initialize(tuning))
    num_parameters = sum(value.size for value in jax.tree.leaves(state["frozen"]))
    # The embedding is looked up, not multiplied.
    num_parameters -= tuning.config.vocab_size * tuning.config.hidden_size
    extraction = flops[encoders.EXTRACTION]
    assert extraction == pytest.approx(2 * num_parameters * length, rel=0.02)
    assert flops[encoders.FINE_TUNING] == pytest.approx(2 * extraction, rel=0.02)


def tuning_flops(remat):
    tuning = tiny_tuning(8, remat=remat)
    template, state = aot.abstract_state(lambda: encoders.initialize(tuning))
    step, _ = encoders.step_functions(tuning, template)
    batch = encoders.abstract_batch(tuning, 1)
    return program_flops(jax.make_jaxpr(step, static_argnums=2)(state, batch, None).jaxpr)


def test_step_recomputes_less_the_more_it_saves():
    full, mlp, dots, none = map(tuning_flops, ("full", "mlp", "dots", "none"))
    assert full > mlp > dots >= none
    gate_and_up = 2 * NUM_LAYERS * 2 * 8 * HIDDEN_SIZE * MLP_DIM
    assert full - mlp == gate_and_up


@pytest.mark.parametrize("model_parallelism", [1, 2])
def test_no_layer_moves_rows_between_devices(model_parallelism):
    length, num_rows = 6, 24
    tuning = tiny_tuning(length, remat="full")
    partitioner = encoders.make_partitioner(jax.devices(), model_parallelism)
    program, state = encoders.compile_programs(tuning, partitioner)[encoders.EXTRACTION]
    batch = encoders.abstract_batch(tuning, num_rows)
    compiled = program.function.lower(*aot.shard_shapes(partitioner, state, batch)).compile()
    shapes = re.findall(r"= (.*) all-(?:gather|reduce|to-all)(?:-start)?\(", compiled.as_text())
    assert any(f",{MLP_DIM // model_parallelism}]" in shape for shape in shapes)  # MLP kernels
    assert not any(f"[{num_rows},{length},{HIDDEN_SIZE}]" in shape for shape in shapes)


def test_both_programs_are_timed():
    rows = encoders.measure_encoder("tiny", length=4, rows=1, steps=1)
    assert [row["what"] for row in rows] == [encoders.EXTRACTION, encoders.FINE_TUNING]
    for row in rows:
        assert row["rows"] == row["devices"] == jax.device_count()
        assert row["median_ms"] > 0 and row["utilization"] is None  # unknown for CPUs


@pytest.mark.parity
@needs_libtpu
@pytest.mark.parametrize("model_parallelism", [1, 2])
def test_both_programs_compile_for_tpus(model_parallelism):
    sections = encoders.compile_for_tpus(
        "tiny", "v5e:2x2", length=4, rows=2, model_parallelism=model_parallelism
    )
    tuning_title, extraction_title = sections
    assert tuning_title.startswith(f"{encoders.FINE_TUNING}, predicted")
    assert extraction_title.startswith(f"{encoders.EXTRACTION}, predicted")
    for (row,) in sections.values():
        assert row["data_x_model"] == f"{4 // model_parallelism} x {model_parallelism}"
        assert row["rows"] == 8 and row["fits"]
        assert row["utterances_per_second"] == pytest.approx(8e3 / row["predicted_ms"])
    (tuning,), (extraction,) = sections.values()
    # The model's FLOPs exclude what the backward pass recomputes.
    assert tuning["executed_gflop_per_device"] > 1.05 * tuning["model_gflop_per_device"]
    assert extraction["executed_gflop_per_device"] == pytest.approx(
        extraction["model_gflop_per_device"]
    )


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        ("gpt", {}, "--encoder=gpt; allowed: llama_3_1_8b, "),
        ("tiny", {"length": 0}, "--sequence=0; allowed: 1 or more"),
        ("tiny", {"rows": -1}, "--rows=-1; allowed: 1 or more"),
    ],
)
def test_invalid_options_are_named(encoder, options, message):
    with pytest.raises(InputError, match=message):
        encoders.measure_encoder(encoder, **options)


@pytest.mark.parity
@needs_libtpu
def test_matrix_products_are_not_recomputed_with_dots():
    options = {"length": 4, "rows": 2}
    (full,), _ = encoders.compile_for_tpus("tiny", "v5e:2x2", **options).values()
    (dots,), _ = encoders.compile_for_tpus("tiny", "v5e:2x2", remat="dots", **options).values()
    assert (full["remat"], dots["remat"]) == ("full", "dots")
    assert dots["executed_gflop_per_device"] < full["executed_gflop_per_device"]
    assert dots["model_gflop_per_device"] == full["model_gflop_per_device"]


@needs_libtpu
def test_model_parallelism_must_divide_the_chips():
    with pytest.raises(InputError, match="--model_parallelism=3; allowed: divisors of the 4"):
        encoders.compile_for_tpus("tiny", "v5e:2x2", model_parallelism=3)
