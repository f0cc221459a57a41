"""How many bytes of tensors a call holds at once."""

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tvkernels.testing.calls import tensors


class Held(TorchDispatchMode):
    """Bytes alive that operations inside have allocated: the most in all, at each attention, and
    between one attention and the next.
    """

    def __init__(self, given):
        super().__init__()
        self.given = {StorageWeakRef(x.untyped_storage()).cdata for x in tensors(given)}
        self.made, self.most, self.at_attention, self.between = {}, 0, [], [0]

    def now(self):
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return sum(size for _, size in self.made.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "scaled_dot_product" in name and "backward" not in name:
            self.at_attention.append(self.now())
            self.between.append(0)
        result = function(*args, **(kwargs or {}))
        for x in tensors(result):
            ref = StorageWeakRef(x.untyped_storage())
            if ref.cdata not in self.given:
                self.made[ref.cdata] = (ref, x.untyped_storage().nbytes())
        self.between[-1] = max(self.between[-1], self.now())
        self.most = max(self.between)
        return result
