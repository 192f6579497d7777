"""Whether an op may run as a plain function call, without torch's dispatcher: some 20 microseconds less a call.

What the dispatcher adds to an op written in Python is what only others need: a node that torch.compile, a tracer or a
mode can see, and the refusal of backward. Where none of them is there to see it, the implementation is called itself.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Return whether nobody but the caller sees an op on these tensors, so that its implementation may be called.

    That is: they are ordinary tensors on the CPU, none needs a gradient, and no compiler, tracer, mode, functional
    transform or forward differentiation is active.
    """
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cpu or (grad and tensor.requires_grad):
            return False
    return True
