"""Triton's interpreter without the half of its time that goes into doing the same thing again.

Each call of a device function looks through `triton.language` for what must be replaced, all of
which the launch it is in has replaced, and each operation builds the table of NumPy's dtypes. What
a kernel computes is left alone.
"""

import inspect


def hasten(interpreter):
    """Changes the module `triton.runtime.interpreter` in place, where it is as is expected."""
    names = ("GridExecutor", "_patch_lang", "_get_np_dtype", "tl")
    if not all(hasattr(interpreter, name) for name in names):
        return
    executor, patch, look_up, tl = (getattr(interpreter, name) for name in names)
    if hasattr(patch, "__wrapped__"):
        return
    call = executor.__call__
    patched, dtypes = set(), {}

    def patch_once(fn):
        values = fn.__globals__.values()
        langs = {id(x) for x in values if inspect.ismodule(x) and (x is tl or x is tl.core)}
        if langs and langs <= patched:
            return None
        patched.update(langs)
        return patch(fn)

    def np_dtype(dtype):
        scalar = dtype.scalar
        key = "pointer" if scalar.is_ptr() else scalar.name
        if key not in dtypes:
            dtypes[key] = look_up(scalar)
        return dtypes[key]

    def launch(self, *args, **kwargs):
        patched.clear()
        try:
            return call(self, *args, **kwargs)
        finally:
            patched.clear()

    patch_once.__wrapped__ = patch
    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype
    executor.__call__ = launch
