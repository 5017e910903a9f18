"""python -m sit_atconv.latents encode | verify: caches of latents."""

from sit_atconv.commands import several

main = several("python -m sit_atconv.latents", ("encode", "verify"), __doc__)

if __name__ == "__main__":
    main()
