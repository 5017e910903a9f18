"""python -m sampling COMMAND ...: samples by index, likelihoods, and the speed of models."""

from sit_atconv.commands import several

main = several("python -m sampling", ("generate", "likelihood", "speed"), __doc__)

if __name__ == "__main__":
    main()
