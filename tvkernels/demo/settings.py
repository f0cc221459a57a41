"""Numbers that replace a method's own where the embedded model is in use.

The papers tune a model of 860 million parameters, 500 steps at 3e-5; this one has 4 million.
A method that is not listed keeps its own numbers.
"""

# CPU seconds for 8 frames of 128 x 128 on one x86-64 core: a step of tuning 0.94 (Tune-A-Video)
# and 1.15 (EI2), of inversion 0.2 and 0.3, of guided sampling 0.5 and 0.6.
OVERRIDES: dict[str, dict[str, int | float]] = {
    "ei2": {"tune_steps": 25, "learning_rate": 1e-3, "steps": 20, "guidance": 7.5},
    "tune-a-video": {"tune_steps": 25, "learning_rate": 1e-3, "steps": 20, "guidance": 7.5},
    "frame-by-frame": {"steps": 20, "guidance": 7.5},
}
