"""What the GPU kernels share.

    tiles.py     loads and stores of tiles, how matmuls round, how a kernel is launched
    chunks.py    ops with a matrix state: what a kernel reads of one chunk of tokens
    decay.py     products of decays inside a chunk, and their adjoint
    inverse.py   inverse of a unit lower-triangular matrix
    pieces.py    long sequences, one piece of time after another
    channels.py  elementwise recurrences: channels side by side, tokens one after another

**The four cuts of time.** Each cut divides what the one above it leaves.

    sequence  [0                                                                    T)
    piece     [                piece 0                ][            piece 1          )
    part      [     part 0      ][      part 1        ]
    chunk     [c0][c1][c2][c3][c4]
    turn      [][]

piece: what one call of the kernels sees. Pieces run one after another, so that memory between
  kernels does not grow with the sequence (`pieces.py`; only where kernels hand each other arrays
  of the size of the inputs).
part: what one program of a kernel sees. Parts run side by side, where batch and heads or channels
  give too few programs to fill a GPU (`tiles.split_time`). An extra kernel first computes what
  each part adds to a state and how it decays it; from these `tiles.part_starts` computes the state
  that enters each part.
chunk: C consecutive tokens of a part. With a matrix state a chunk is one set of matmuls. In
  elementwise recurrences it is the distance between states that are kept for the backward pass.
turn: the few tokens of a chunk that an elementwise kernel loads at once, because only loads that
  are under way together hide the latency of memory.

**Other words.**
program: one instance of a kernel, a group of warps. Programs have no order among them.
tile: a block of an array that a program holds in registers; each side is a power of two.
span: consecutive indices along one axis of an array, and which of them exist (`tiles.Span`).
carry: the values that a loop over time hands on to its next step, such as the state.
keep: 1 where the state before a token survives into it, 0 where the token starts a segment.
walking order: the order in which the recurrence runs, with `reverse` from the last token to the
  first. Kernels count parts, chunks and tokens in it, and arrays between kernels are in it. Only
  where inputs [B, T, ..] are loaded and outputs stored does `reverse` change the index.
padded rows: [G C], the tokens of an array between kernels, T rounded up to whole chunks.
refs, out: a kernel's references to the arrays that it reads and writes, each a `NamedTuple` whose
  fields are named like the tiles that are loaded from them. Before the launch the same tuples hold
  arrays and shapes.

In equations A B is a matrix product and A . B an elementwise one, in which a vector [C] multiplies
the rows of a matrix; dX is the gradient of X.

Letters: B batch, T time, H heads, HK heads of q and k, K key and V value channels, D channels,
N states of a channel, C tokens of a chunk, G chunks. In shape comments K and V may be one tile of
the channels.
"""
