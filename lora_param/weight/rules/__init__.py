"""What operations do with an adapted weight without building it. Anything else builds it.

Importing this package registers every rule:

- `linear`: F.linear;
- `views`: transposes, slices and indices, which give adapted weights again;
- `matmul`, `einsum`, `grouped`: products of matrices and of stacks of matrices;
- `embedding`: rows gathered from a table;
- `conv`: convolutions and transposed convolutions of one group;
- `attention`, `recurrent`: functions that torch composes of the above.

A rule takes the operation's arguments. It returns `NotImplemented` where it does not apply, or
where building the weight is the cheaper way.
"""

from lora_param.weight.rules import (  # noqa: F401
    attention,
    conv,
    einsum,
    embedding,
    grouped,
    linear,
    matmul,
    recurrent,
    views,
)

__all__: list[str] = []
