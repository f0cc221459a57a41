"""Every scheduler of diffusers: its noise levels are followed, or it is refused in one line."""

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tvkernels import guided_ddim_step
from tvkernels.pipelines.checks import ModelError
from tvkernels.pipelines.common import ddim_schedulers, ddim_table

SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
FOLLOWED = {
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler",
    "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler",
    "TCDScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
# Arguments of those that do not take Stable Diffusion's configuration.
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 3}, "VQDiffusionScheduler": {"num_vec_classes": 4},
    "UnCLIPScheduler": {},
    "RFD4ProteinaScheduler": {"schedule_mode": "power", "noise_mode": "1/t", "tsr_k": 1.0,
                              "tsr_sigma": 1.0},
}  # fmt: skip


def schedulers() -> dict[str, type]:
    found = {}
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            kind = getattr(diffusers, name)
            stands_in = "dummy" in kind.__module__  # for one whose library is not here
            if inspect.isclass(kind) and hasattr(kind, "from_config") and not stands_in:
                found[name] = kind
    return found


@pytest.mark.parametrize("name", sorted(schedulers()))
def test_every_class_is_followed_or_refused(name):
    kind = schedulers()[name]
    scheduler = kind(**NEEDED[name]) if name in NEEDED else kind.from_config(SD)
    if name not in FOLLOWED:
        with pytest.raises(ModelError, match=": give a ") as error:
            ddim_schedulers(scheduler)
        assert "\n" not in str(error.value)
        return
    pair = ddim_schedulers(scheduler)
    for ddim in pair:
        timesteps, rows = ddim_table(ddim, 4, 7.5, "cpu")
        assert torch.equal(ddim.alphas_cumprod, pair[0].alphas_cumprod)
        latents = torch.ones(1, 4, 2, 2)
        for row in rows:
            latents = guided_ddim_step(latents, torch.ones(2, 4, 2, 2), row)
        assert latents.isfinite().all() and len(timesteps) == 4
    torch.testing.assert_close(pair[0].alphas_cumprod, scheduler.alphas_cumprod)


def test_the_table_knows_every_class():
    assert set(schedulers()) | {"DPMSolverSDEScheduler"} >= FOLLOWED  # needs torchsde


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"prediction_type": "sample"}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
        ("CogVideoXDDIMScheduler", {}),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2, 1.0], "num_train_timesteps": 3}),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2, 0.3]}),
    ],
)
def test_what_ddim_cannot_follow_is_refused(name, changes):
    scheduler = getattr(diffusers, name).from_config({**SD, **changes})
    with pytest.raises(ModelError, match=": ") as error:
        ddim_schedulers(scheduler)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDIMScheduler", {"trained_betas": [0.01 * (i + 1) for i in range(20)],
                           "num_train_timesteps": 20}),
        ("PNDMScheduler", {"timestep_spacing": "linspace"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ],
)  # fmt: skip
def test_other_betas_and_ways_of_stepping_are_followed(name, changes):
    scheduler = getattr(diffusers, name).from_config({**SD, **changes})
    for ddim in ddim_schedulers(scheduler):
        torch.testing.assert_close(ddim.alphas_cumprod, scheduler.alphas_cumprod)
        assert ddim_table(ddim, 4, 7.5, "cpu")[1].isfinite().all()


def test_a_refused_scheduler_leaves_the_one_before(load):
    pipe = load("frame-by-frame")
    before = pipe.scheduler, pipe.inverse_scheduler
    with pytest.raises(ModelError):
        pipe.scheduler = DDIMScheduler.from_config({**SD, "rescale_betas_zero_snr": True})
    assert (pipe.scheduler, pipe.inverse_scheduler) == before
    pipe.scheduler = DDPMScheduler.from_config({**SD, "beta_end": 0.02})
    assert math.isclose(pipe.scheduler.alphas_cumprod[0], 1 - 0.00085, rel_tol=1e-4)
