"""Images from a trained model: the settings, the one routine, and what is written of them."""

FORMATS = ("png", "npz")  # of a folder of samples

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# diffusers' schedulers that follow our path: {name: (class, options, its option of the time shift)}
SCHEDULERS = {
    "flow-match-euler": ("FlowMatchEulerDiscreteScheduler", {}, "shift"),
    "flow-match-heun": ("FlowMatchHeunDiscreteScheduler", {}, "shift"),
    "flow-match-lcm": ("FlowMatchLCMScheduler", {}, "shift"),
    "unipc": ("UniPCMultistepScheduler", FLOW, "flow_shift"),
    "dpm++": ("DPMSolverMultistepScheduler", FLOW, "flow_shift"),
}
