"""The programs of the large encoders run with random parameters, and compile for TPUs."""

import importlib.util
import re

import jax
import pytest

from benchmarks import encoders
from benchmarks.aot import placed_batch, placed_state
from mister_jax.encoders.decoder import DecoderConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs by libtpu"
)
LAYERS, WIDTH, MLP = 2, 16, 48


def tiny_text(length, **options):
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        mlp_dim=MLP,
        num_layers=LAYERS,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        lora=LoRAConfig(rank=2, alpha=4),
        **options,
    )
    return encoders.TextTuning(config, length)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, "tiny", tiny_text)


@pytest.mark.parametrize("encoder", ["llama_3_1_8b", "qwen2_5_7b"])
def test_flops_are_two_a_parameter_and_token_forward_and_four_in_tuning(encoder):
    length = 128
    step, extract = encoders._model_flops(encoders.tuning_of(encoder, length, remat="none"))
    config = encoders.tuning_of(encoder, length).config
    shapes = jax.eval_shape(lambda: encoders._initial(encoders.tuning_of(encoder, length)))
    kernels = sum(value.size for value in jax.tree.leaves(shapes[1]["frozen"]))
    kernels -= (
        config.vocab_size * config.hidden_size
    )  # a row of the embedding is read, not multiplied
    assert extract == pytest.approx(2 * kernels * length, rel=0.02)
    assert step == pytest.approx(2 * extract, rel=0.02)


@pytest.mark.parametrize("model_parallelism", [1, 2])
def test_no_layer_moves_the_rows_of_a_batch_between_devices(model_parallelism):
    length = 6
    spread = encoders._spread(jax.devices(), model_parallelism)
    program = encoders.programs("tiny", length, spread, 24)[encoders.EXTRACTION]
    batch = placed_batch(spread, encoders._shapes(tiny_text(length), 24))
    compiled = program.function.lower(placed_state(spread, program.state), batch).compile()
    sent = re.findall(r"= (.*) all-(?:gather|reduce|to-all)(?:-start)?\(", compiled.as_text())
    assert any(f",{MLP // model_parallelism}]" in shape for shape in sent)  # kernels
    assert not any(f"[24,{length},{WIDTH}]" in shape for shape in sent)


def test_both_programs_are_timed():
    rows = encoders.run("tiny", length=4, rows=1, steps=1)
    assert [row["what"] for row in rows] == [encoders.EXTRACTION, encoders.TUNING_STEP]
    for row in rows:
        assert row["rows"] == row["devices"] == jax.device_count()
        assert row["median_ms"] > 0 and row["utilisation"] is None  # of a CPU


@pytest.mark.parity
@needs_libtpu
@pytest.mark.parametrize("model_parallelism", [1, 2])
def test_both_programs_compile_for_tpus(model_parallelism):
    sections = encoders.predict(
        "tiny", "v5e:2x2", length=4, rows=2, model_parallelism=model_parallelism
    )
    step, extraction = sections
    assert step.startswith(f"{encoders.TUNING_STEP}, predicted")
    assert extraction.startswith(f"{encoders.EXTRACTION}, predicted")
    for (row,) in sections.values():
        assert row["data_x_model"] == f"{4 // model_parallelism} x {model_parallelism}"
        assert row["rows"] == 8 and row["fits"]
        assert row["utterances_per_second"] == pytest.approx(8e3 / row["predicted_ms"])
    (step,), (extraction,) = sections.values()
    # What is computed anew in the backward pass is work, but none of the model's.
    assert step["executed_gflop_per_device"] > 1.05 * step["model_gflop_per_device"]
    assert extraction["executed_gflop_per_device"] == pytest.approx(
        extraction["model_gflop_per_device"]
    )


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("gpt",), {}, "encoder 'gpt'; allowed are llama_3_1_8b, "),
        (("tiny",), {"length": 0}, "sequence 0; must be at least 1"),
        (("tiny",), {"rows": -1}, "rows -1; allowed are 1 or more"),
    ],
)
def test_what_cannot_be_run_is_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        encoders.run(*arguments, **options)


@needs_libtpu
def test_chips_are_shared_out_evenly():
    with pytest.raises(InputError, match="model_parallelism 3; allowed are divisors of the 4"):
        encoders.predict("tiny", "v5e:2x2", model_parallelism=3)
