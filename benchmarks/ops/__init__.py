"""The ops: right, timed beside rivals and the limit, tuned; on a device in `gpu`."""
