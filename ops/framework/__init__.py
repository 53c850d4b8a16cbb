"""What makes a function on arrays an op: one file for each question.

    op                  how a call becomes two rules, on one device or many, forwards or in reverse
    derivatives         what JAX makes of the two rules: gradients, tangents, second derivatives
    platforms           which implementation runs, and whether its kernels are interpreted
    arguments           what a public function checks
    segments            whether a segment goes on at a token
    sharding            which axes of a mesh cut which dimension of an array
    sequence_parallel   what devices that hold consecutive parts of time send each other
    grid                tokens that lie on a grid
    time_parts          parts of time as rows of a batch, for layers that rearrange tokens
    examples            realistic arguments, for tests and benchmarks

**Words.** Time is cut four times, from the outside in:

    device part of time   what one device holds where a mesh cuts time
    piece                 what a GPU's kernels are called with at once, for memory that does not
                          grow with the sequence
    part                  what one GPU program walks over, where batch and heads are too few
    chunk                 C tokens whose products are matmuls, or between whose starts states are
                          made anew
    turn                  the tokens that a GPU program loads at once

    tile                  the block of an array that a kernel holds at a time
    carry                 the state that a loop hands on
    keep                  1 where the state reaches a token, 0 where a segment starts
    final state           the one after the last token of the walk, which `reverse` begins at the
                          last token of time

**A new op** is a folder of `ops/` with
1. `reference.py`: the definition, `lax.scan` in float32, importing jax alone;
2. `xla.py`: `forward(*inputs, **static)` -> outputs, `backward(*inputs, *cotangents, **static)` ->
   gradients of the inputs up to the last that has one;
3. `sequence_parallel.py`: `RULES`, most often an `Affine` of two functions;
4. `api.py`: the public function, which checks and calls `op.run` with a layout for each array;
5. `examples.py`: shapes, inputs and flops for tests and benchmarks;
6. kernels when they pay: `pallas_tpu`, `pallas_gpu`, with the rules of `xla.py`, `interpret` beside
   `static`, and `supports` where they do not take everything.
Its name joins `ops/__init__.py`, its test is `tests/contracts/ops.py` by a row."""
