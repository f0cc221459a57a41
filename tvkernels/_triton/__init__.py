"""What every op's Triton backend shares: reasons against a call, configurations, the launch.

Importing this package loads neither triton nor a device.
"""
