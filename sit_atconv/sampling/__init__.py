"""Images from a trained model: the settings, the one routine, and what is written of them."""

FORMATS = ("png", "npz")  # of a folder of samples

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# diffusers' schedulers that follow our path: {name: (class, options, its option of the time shift)}. Those without
# one bring the smallest level of training under the shift twice, and so take their last step from a level far over it.
SCHEDULERS = {
    "flow-match-euler": ("FlowMatchEulerDiscreteScheduler", {}, "shift"),
    "flow-match-heun": ("FlowMatchHeunDiscreteScheduler", {}, None),
    "flow-match-lcm": ("FlowMatchLCMScheduler", {}, None),
    "unipc": ("UniPCMultistepScheduler", FLOW, "flow_shift"),
    "dpm++": ("DPMSolverMultistepScheduler", FLOW, "flow_shift"),
}
