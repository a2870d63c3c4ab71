"""Native kernels for the CPU, chosen at run time for its instruction set; without them the same in JAX or NumPy.

    arrays.py     NumPy arrays and mapped files    ─┐
    jitted.py     inside jit, through XLA's FFI    ─┼─ library.py ─ _native: src/*.hpp once per instruction set
    attention.py  and its parts, see there         ─┤
    norm.py       RMSNorm and its residual         ─┤
    activation.py SwiGLU, SiLU, GELU               ─┤
    cross_entropy.py  a linear head and its loss   ─┤
    few_rows.py   generation's products, int8.py   ─┘
    reference.py  what `arrays.py` must equal

    attention.py ► attention_rules.py (derivatives, and which program runs where) ► plain_attention.py, elsewhere.py
    rotary.py, matmul.py, softmax.py are plain JAX

To add a kernel: a header in src/, its call in `calls.hpp`, a line in `table.hpp` and in `kernels.cpp`, and a handler in
a file `ffi_*.cpp`, named in `ffi.cpp`.
"""
