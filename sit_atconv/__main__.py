"""sit-atconv COMMAND ...: diffusion transformers with ATConv, trained, sampled, scored, timed and published."""

from sit_atconv.commands import COMMANDS, several

main = several("sit-atconv", COMMANDS, __doc__)

if __name__ == "__main__":
    main()
