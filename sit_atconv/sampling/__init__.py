"""Images from a trained model: the settings, the one routine, and what is written of them."""

FORMATS = ("png", "npz")  # of a folder of samples

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# diffusers' schedulers that follow our path: {name: (class, options)}
SCHEDULERS = {
    "flow-match-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-match-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-match-lcm": ("FlowMatchLCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "dpm++": ("DPMSolverMultistepScheduler", FLOW),
}
