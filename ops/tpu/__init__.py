"""What the TPU kernels share.

    kernel.py          one kernel over a grid: its tiles, its references, its chains of work
    matmul.py          products of matrices and their precision
    heads.py           the grid of ops with a matrix state: blocks of heads, chunks of tokens
    segments.py        the same where every segment has a state of its own
    fit.py             heads of any size, padded or cut until they fit the fast memory
    channels.py        the grid of elementwise recurrences: chunks of tokens, blocks of channels
    chunk_products.py  what a kernel asks of the decays of a chunk
    decay.py           the kinds of decay that answer it
    channel_decay.py   the one of them where every channel decays by itself
    inverse.py         inverse of a unit lower-triangular matrix
    gradients.py       layout of the gradients of ops with a matrix state

**Words** of `ops/framework/__init__.py`, and what they are here:

    tile            the block of an array that a grid step has in fast memory (VMEM)
    chunk           C tokens, a grid step's share of time; chunks run in order on one core
    carry           what a chunk hands on to the next one, the state forward and its gradient
                    backward; it stays in fast memory, in scratch or in an output tile whose place
                    does not change
    keep            1 where the state before a token reaches it, 0 where a segment starts
    kind of decay   none, one per token and head, or one per token, head and channel: what
                    `kind_of_decay` chooses, between which a kernel does not distinguish
    rows, lanes     the two axes of a register, [8, 128] in float32; rows are also called sublanes

**References.** A kernel has one `NamedTuple` of references. The rule that calls it fills the same
tuple with an `Input`, an `Output` or scratch memory at each field, None for what a call does not
have; `kernel.call` passes the kernel the tuple with references in their places and returns it with
the results in theirs.

**Interleaved heads.** The compiler keeps the order of the source, and one head is a chain of small
matmuls of which each waits for the one before. A kernel therefore writes a head as a Python
generator that yields where it would wait, and `kernel.interleave` runs one step of each head in
turn. This happens while the kernel is traced: the compiled program has the heads' operations in
alternating order, and no generators. A function that needs such pauses is a generator too, and its
result arrives by `result = yield from function(...)`.

    def head(h):
        product = matmul.nn(a[h], b[h])
        yield                          # the other heads start their products meanwhile
        refs.o[h] = jnp.exp(product)

    interleave(head(h) for h in range(heads))
"""
