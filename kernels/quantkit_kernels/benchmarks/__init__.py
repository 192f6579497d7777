"""How fast the ops are beside what else there is, on this machine, in one run; and the choice of tiles by trying out.

| module | what it knows |
| --- | --- |
| shapes | linear layers of known models, as data |
| cases | every op of a linear layer: its operands, its call, what it must give |
| experts, quantizers | the same for the layers of a mixture and for what quantizes activations |
| baselines | torch's own products, torchao and bitsandbytes where they are installed |
| correctness | whether a result is right: what is wrong gets no time |
| gpu_clock, cpu_clock | how calls are timed, and the facts about the machine |
| roofline | the floor that bytes and operations set, and a picture of it |
| table | what is measured, and the table |
| tuning | the fastest of the shipped configurations, for the user's table |

Nothing here is imported by the ops.
"""
