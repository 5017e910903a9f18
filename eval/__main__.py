"""python -m eval COMMAND ...: from images to features, scores and pages."""

from sit_atconv.commands import several

main = several("python -m eval", ("extract", "build-ref", "score", "verify", "table", "report"), __doc__)

if __name__ == "__main__":
    main()
