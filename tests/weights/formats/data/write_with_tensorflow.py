"""Writes the checkpoints in this folder with TensorFlow. The tests then need no TensorFlow.

    pip install tensorflow-cpu && python tests/weights/formats/data/write_with_tensorflow.py

The checkpoints here are from TensorFlow 2.21. `tiny` is a GPT-2 in the form in which OpenAI saved
theirs (src/model.py of https://github.com/openai/gpt-2). Its values count up in steps of 1/1024,
through the variables in the order of their names. Each of the other bundles shows one thing.
"""

import json
import math
from pathlib import Path

import tensorflow as tf

HERE = Path(__file__).parent
HPARAMS = {"n_vocab": 31, "n_ctx": 10, "n_embd": 12, "n_head": 3, "n_layer": 2}


def shapes(n_vocab: int, n_ctx: int, n_embd: int, n_head: int, n_layer: int) -> dict[str, list]:
    norm = {"g": [n_embd], "b": [n_embd]}
    in_block = {
        "ln_1": norm,
        "attn/c_attn": {"w": [1, n_embd, 3 * n_embd], "b": [3 * n_embd]},
        "attn/c_proj": {"w": [1, n_embd, n_embd], "b": [n_embd]},
        "ln_2": norm,
        "mlp/c_fc": {"w": [1, n_embd, 4 * n_embd], "b": [4 * n_embd]},
        "mlp/c_proj": {"w": [1, 4 * n_embd, n_embd], "b": [n_embd]},
    }
    scopes = {"model": {"wpe": [n_ctx, n_embd], "wte": [n_vocab, n_embd]}, "model/ln_f": norm}
    for layer in range(n_layer):
        scopes |= {f"model/h{layer}/{scope}": names for scope, names in in_block.items()}
    return {f"{scope}/{name}": shape for scope in scopes for name, shape in scopes[scope].items()}


def write_tiny(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        first = 0
        for name, shape in sorted(shapes(**HPARAMS).items()):
            count = math.prod(shape)
            values = tf.range(first, first + count, dtype=tf.float32) / 1024
            tf.compat.v1.get_variable(name, initializer=tf.reshape(values, shape))
            first += count
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(save_relative_paths=True)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)


def write_bundle(name: str, slices: str = "", **tensors: tf.Tensor) -> None:
    tf.raw_ops.SaveV2(
        prefix=str(HERE / name),
        tensor_names=[*tensors],
        shape_and_slices=[slices] * len(tensors),
        tensors=[*tensors.values()],
    )


def write_shards() -> None:
    """Every dtype that can be read. An odd number of halves makes what follows unaligned."""
    write_bundle("first", bfloat16=tf.range(3, dtype=tf.bfloat16), double=tf.eye(2, dtype="double"))
    write_bundle("second", half=tf.range(5, dtype=tf.float16), scalar=tf.constant(2.5))
    shards = [str(HERE / name) for name in ("first", "second")]
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=shards, destination_prefix=str(HERE / "shards"), delete_old_dirs=False
    )


if __name__ == "__main__":
    write_tiny(HERE / "tiny")
    write_shards()
    write_bundle("slices", slices="4 2 0,3:-", weight=tf.ones([3, 2]))
    write_bundle("integers", global_step=tf.constant(7, dtype=tf.int64), weight=tf.ones([3, 2]))
