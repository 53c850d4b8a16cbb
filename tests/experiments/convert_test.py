"""Public checkpoints come in with their logits and go out as they came."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from experiments.configs.of_run import get_config
from experiments.conversion.reading import Checkpoint, read_checkpoint
from experiments.conversion.runs import bring_in, bring_out
from experiments.conversion.writing import write_checkpoint
from experiments.generate import generate
from experiments.training.config import validate
from experiments.training.mesh import parameter_name
from experiments.training.run_loading import load_run
from models.weights.families import find_format

DATA = Path(__file__).parent.parent / "data/checkpoints"
FAMILIES = {
    "llama_gqa_tied": "llama",
    "llama_sharded_bf16": "llama",
    "mistral_window": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mamba": "mamba",
    "mamba2_groups": "mamba2",
    "gla": "gla",
    "delta_net": "delta_net",
    "gated_deltanet_hybrid": "gated_deltanet",
    "kda": "kda",
    "retnet": "retnet",
    "hgrn2": "hgrn2",
    "lightnet": "lightnet",
    "mom": "mom",
    "bamba": "bamba",
    "qwen3_next_dense": "qwen3_next",
    "qwen3_next_moe": "qwen3_next",
    "kimi_linear": "kimi_linear",
    "minimax": "minimax",
    "olmo_hybrid": "olmo_hybrid",
}


def numbers(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        opened: Any = safe_open(file, framework="numpy")
        found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return found


def logits(checkpoint: Checkpoint, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The model's logits, padding being a segment of its own."""
    graphdef, params, variables = nnx.split(
        nnx.eval_shape(lambda: checkpoint.blueprint.build(jnp.uint32(0))), nnx.Param, ...
    )
    if jax.tree.leaves(variables):  # constants of layers
        variables = jax.jit(
            lambda: nnx.split(checkpoint.blueprint.build(jnp.uint32(0)), nnx.Param, ...)[2]
        )()
    arrays = jax.tree.map_with_path(
        lambda path, _: checkpoint.params[parameter_name(path)], nnx.to_pure_dict(params)
    )
    positions = np.maximum(np.cumsum(real, axis=1, dtype=np.int32) - 1, 0)

    @jax.jit
    def apply(arrays: Any) -> jax.Array:
        model: Any = nnx.merge(graphdef, arrays, variables)
        return model(tokens, positions=positions, segment_ids=real)[0]

    return np.asarray(apply(arrays))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_the_published_ones(name: str) -> None:
    data = np.load(DATA / name / "io.npz")
    steps = data["greedy"].shape[1]
    tokens = np.concatenate([data["input_ids"], data["greedy"]], axis=1)
    real = np.concatenate([data["attention_mask"], np.ones_like(data["greedy"])], axis=1)
    checkpoint = read_checkpoint(DATA / name, dtype="float32")
    found = logits(checkpoint, tokens, real.astype(np.int32))
    length = data["input_ids"].shape[1]
    seen = data["attention_mask"].astype(bool)
    difference = (found[:, :length] - data["logits"])[seen]
    assert np.linalg.norm(difference) < 2e-5 * np.linalg.norm(data["logits"][seen])
    np.testing.assert_array_equal(np.argmax(found, -1)[:, length - 1 : -1], data["greedy"])
    assert steps == 8 and not checkpoint.warnings


@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_out_is_what_came_in(name: str, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(DATA / name)
    family = write_checkpoint(
        tmp_path / "out",
        checkpoint.config,
        checkpoint.params,
        family=FAMILIES[name],
        file_bytes=60_000,
    )
    assert family == FAMILIES[name]
    before, after = numbers(DATA / name), numbers(tmp_path / "out")
    for constant in [n for n in before if find_format(family).ignored(n)]:
        del before[constant]
    assert before.keys() == after.keys()
    for tensor, array in before.items():
        assert array.dtype == after[tensor].dtype, tensor
        np.testing.assert_array_equal(array, after[tensor], err_msg=tensor)
    again = read_checkpoint(tmp_path / "out")
    assert again.config.to_dict() == checkpoint.config.to_dict() and not again.warnings


def test_older_names_are_those_of_today(tmp_path: Path) -> None:
    """The first names of flash-linear-attention, and those of mamba_ssm with its own config."""
    source = tmp_path / "fla"
    shutil.copytree(DATA / "delta_net", source)
    edited(source, norm_first=True)
    tensors = {}
    for name, array in numbers(source).items():
        layer, _, rest = name.partition(".mlp.")
        if rest == "up_proj.weight":
            continue
        if rest == "gate_proj.weight":
            array = np.concatenate((array, numbers(source)[f"{layer}.mlp.up_proj.weight"]))
        tensors[name.replace("attn_norm", "attn.norm").replace("mlp_norm", "mlp.norm")] = array
    save_file(tensors, source / "model.safetensors")
    expected = read_checkpoint(DATA / "delta_net")
    same(read_checkpoint(source), expected)

    source, expected = tmp_path / "mamba", read_checkpoint(DATA / "mamba2_groups")
    source.mkdir()
    public = json.loads((DATA / "mamba2_groups/config.json").read_text())
    ssm = {"layer": "Mamba2", "d_state": public["state_size"], "headdim": public["head_dim"]}
    keys = {"ssm_cfg": ssm | {"ngroups": 2}, "rms_norm": True, "pad_vocab_size_multiple": 16}
    keys |= {"d_model": public["hidden_size"], "n_layer": public["num_hidden_layers"]}
    keys["tie_embeddings"] = expected.config.model.tie_embeddings
    (source / "config.json").write_text(json.dumps(keys))
    tensors = {
        n.replace("embeddings", "embedding"): t for n, t in numbers(DATA / "mamba2_groups").items()
    }
    save_file(tensors, source / "model.safetensors")
    same(read_checkpoint(source), expected)
    edited(source, d_intermediate=8)
    with pytest.raises(ValueError, match="d_intermediate must be 0; got 8"):
        read_checkpoint(source)


def same(found: Checkpoint, expected: Checkpoint) -> None:
    assert not found.warnings and found.config.to_dict() == expected.config.to_dict()
    assert found.params.keys() == expected.params.keys()
    for path, array in expected.params.items():
        np.testing.assert_array_equal(found.params[path], array, err_msg=path)


@pytest.mark.slow
def test_a_checkpoint_becomes_a_run_that_generates_and_goes_out_again(tmp_path: Path) -> None:
    data = np.load(DATA / "llama_gqa_tied/io.npz")
    source, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(DATA / "llama_gqa_tied", source)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "tokenizer.json").write_text('{"made": "for this test"}')
    bring_in(source, workdir)
    run = load_run(workdir, reads_data=False)
    prompts = [
        ids[mask.astype(bool)]
        for ids, mask in zip(data["input_ids"], data["attention_mask"], strict=True)
    ]
    found = generate(run.blueprint, *run.replica(0), prompts, tokens=8, temperature=0.0)
    np.testing.assert_array_equal(found, data["greedy"])

    config = get_config(str(workdir))
    validate(config)
    assert config.init_from == str(workdir) and config.model == run.config.model

    assert bring_out(run, tmp_path / "out") == "llama"
    public = json.loads((tmp_path / "out/config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    different = {key for key in public if public[key] != original.get(key, public[key])}
    assert not different and public["eos_token_id"] == 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()
    for name, array in numbers(source).items():
        np.testing.assert_array_equal(array, numbers(tmp_path / "out")[name])


def edited(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def retensored(folder: Path, change: Any) -> None:
    tensors = numbers(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lie(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((10**15).to_bytes(8, "little") + file.read_bytes()[8:])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def elsewhere(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../model.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.layers.1.input_layernorm.weight"
MISTAKES = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json must be JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object; got list"),
    "another family": (lambda f: edited(f, model_type="opt"), "one of llama, .*; got 'opt'"),
    "quantised": (lambda f: edited(f, quantization_config={}), "quantization_config"),
    "an activation": (lambda f: edited(f, hidden_act="relu"), 'hidden_act must be .*"relu"'),
    "a rotation": (
        lambda f: edited(f, rope_scaling={"type": "longrope", "factor": 2.0}),
        "rope_type must be .*'longrope'",
    ),
    "no width": (lambda f: edited(f, hidden_size=None), "must have the key 'hidden_size'"),
    "half a layer": (lambda f: edited(f, num_hidden_layers=1.5), "num_hidden_layers must be an"),
    "another width": (
        lambda f: edited(f, intermediate_size=88),
        r"mlp.gate_proj.weight must have shape \(88, 48\) .*; got \(80, 48\)",
    ),
    "fewer layers": (
        lambda f: edited(f, num_hidden_layers=2),
        "has besides the tensors model.layers.2.input_layernorm.weight, .* and 4 more",
    ),
    "one less": (lambda f: retensored(f, lambda t: t.pop(NORM)), f"lacks the tensors {NORM}"),
    "integers": (
        lambda f: retensored(f, lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
        f"tensor {NORM} of .* got I8",
    ),
    "another head": (
        lambda f: retensored(
            f, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]})
        ),
        "tie_word_embeddings is true, but lm_head.weight differs",
    ),
    "cut": (cut, "model.safetensors is damaged"),
    "a lying header": (lie, "model.safetensors is damaged"),
    "a pickle": (pickled, "pytorch_model.bin, a pickle"),
    "a file elsewhere": (elsewhere, "files beside it; got '../../model.safetensors'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_read_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    change, message = MISTAKES[name]
    source = tmp_path / "source"
    shutil.copytree(DATA / "llama_gqa_tied", source)
    change(source)
    with pytest.raises(ValueError, match=message) as caught:
        bring_in(source, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_keys_that_are_not_known_are_told_of(tmp_path: Path) -> None:
    shutil.copytree(DATA / "llama_gqa_tied", tmp_path / "source")
    edited(tmp_path / "source", residual_multiplier=2.0)
    [warning] = read_checkpoint(tmp_path / "source").warnings
    assert warning.endswith("residual_multiplier")


def test_a_model_that_a_family_is_not_is_not_written(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(DATA / "qwen2")
    with pytest.raises(ValueError, match="llama has biases on all projections"):
        write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.params, family="llama")
    assert not (tmp_path / "out").exists()


def generated(folder: Path, width: int, layers: int) -> int:
    """Bytes of a Llama with random weights that it writes."""
    folder.mkdir()
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    keys = {"model_type": "llama", "num_attention_heads": 4, "tie_word_embeddings": True, **sizes}
    (folder / "config.json").write_text(json.dumps(keys))
    shapes = {"model.embed_tokens.weight": (50, width), "model.norm.weight": (width,)}
    for layer in (f"model.layers.{i}" for i in range(layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (3 * width, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, 3 * width)
        shapes |= {
            f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")
        }
    random = np.random.default_rng(0)
    tensors = {n: random.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return sum(array.nbytes for array in tensors.values())


# Reading has one tensor beside the weights; a save has the largest array once more, of all layers'
# maps of one kind, and buffers of the library that writes it.
MEMORY = {
    "reading.read_checkpoint(source)": 1.2,
    "runs.bring_in(source, source.with_suffix('.run'))": 1.8,
}


@pytest.mark.full
@pytest.mark.parametrize("what", MEMORY)
def test_it_takes_little_more_memory_than_the_weights(what: str, tmp_path: Path) -> None:
    code = (
        "import resource, sys, pathlib\n"
        "from experiments.conversion import reading, runs\n"
        "source = pathlib.Path(sys.argv[1])\n"
        f"{what}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    size, peaks = 0, []
    for name, width in (("small", 32), ("large", 1024)):
        size = generated(tmp_path / name, width, layers=8)
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(1024 * int(done.stdout))
    assert size > 400e6
    assert peaks[1] - peaks[0] < MEMORY[what] * size, (peaks, size)
