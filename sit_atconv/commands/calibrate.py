"""Measure the ratios that `--cache mag:THRESHOLD` goes by, and keep them beside the weights of the model.

They are a curve over time, so that other numbers of steps and other samplers can use them.
"""

import argparse

from sit_atconv.commands.options import add_device_options, add_number, add_settings, sampling_asked
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import check_one_process
from sit_atconv.runtime.files import check_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ckpt", metavar="CKPT", help="run folder, checkpoint, its ema/ folder, or a model")
    add_settings(parser, leave_out=["guide"])
    add_number(parser, "--num", limits.PICTURE, 16, "images of random classes, in one batch")
    add_number(parser, "--seed", limits.SEED, 0, "noise of image i is drawn from (seed, i)")
    add_device_options(parser)


def run(args: argparse.Namespace) -> None:
    """Write the ratios, and say where they are."""
    check_one_process()
    args.sampling = sampling_asked(args)
    check_checkpoint(args.ckpt)

    import torch

    from sit_atconv.runtime.devices import numerics, resolve_device
    from sit_atconv.runtime.files import check_out, made_here, write_out
    from sit_atconv.runtime.precision import dtype_of
    from sit_atconv.sampling.calibration import calibrate, place_of, record
    from sit_atconv.sampling.sampling import too_large
    from sit_atconv.sampling.settings import in_short
    from sit_atconv.training.checkpoint import load_trained

    device = resolve_device(args.device)
    trained = load_trained(args.ckpt, dtype_of(args.dtype))
    place, ours = place_of(trained), made_here("times", "ratios", "weights")
    check_out(place, "ratios", ours=ours)
    with numerics(), in_short():
        sampling = args.sampling.for_model(trained.model)
        sampling.check_acts_on(trained.model)
        torch.nn.Module.to(trained.model, device)
        try:
            times, ratios = calibrate(trained.model, sampling, args.num, args.seed)
        except torch.OutOfMemoryError:
            raise too_large(args.num, device, "a smaller one", name="num") from None
    write_out(place, record(trained, sampling, args.num, args.seed, times, ratios), "ratios", ours=ours)
    print(f"{place}: ratios of {len(ratios)} evaluations, {min(ratios):.3f} to {max(ratios):.3f}")
